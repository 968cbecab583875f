"""A sweep: one run, the keys of it that vary, and how the trials are drawn, judged and scheduled."""

from collections.abc import Iterator
from itertools import product
from math import exp, log, prod
from random import Random
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, PositiveInt, Strict, model_serializer, model_validator

from raytorch.config.metrics import Ranking
from raytorch.config.run import RunConfig
from raytorch.config.run_name import RunName
from raytorch.config.section import ConflictError, Section

Values = Annotated[list[Any], Field(min_length=1)]
Range = Annotated[tuple[float, float], Strict(False)]
IntegerRange = Annotated[tuple[int, int], Strict(False)]

MOST_TRIALS = 10_000
"""Of a sweep, each of which is a whole run."""
DIGITS = 4
"""Significant digits of a number that is drawn, so that tables and files stay readable."""


class Parameter(Section):
    """The values of one key of the run: one of these."""

    grid: Values | None = None
    """Every value in turn, with every value of other grids."""
    choice: Values | None = None
    """One of the values, each as likely."""
    uniform: Range | None = None
    """A number between two."""
    log_uniform: Range | None = None
    """A number between two above 0, each order of magnitude as likely: for learning rates."""
    randint: IntegerRange | None = None
    """A whole number from the first to the last, both included."""

    @property
    def kind(self) -> str:
        """The one key that is given."""
        return next(kind for kind in type(self).model_fields if getattr(self, kind) is not None)

    @property
    def values(self) -> tuple[Any, ...]:
        """Values that stand for all: the listed ones, or the ends of a range as numbers of the kind that is drawn."""
        return tuple(getattr(self, self.kind))

    @property
    def is_listed(self) -> bool:
        """True if the values stand in the file one by one."""
        return self.kind in ("grid", "choice")

    def sample(self, random: Random) -> Any:
        """Draw a value; of a grid there is none to draw."""
        low, high = self.values[0], self.values[-1]
        match self.kind:
            case "choice":
                return random.choice(self.values)
            case "randint":
                return random.randint(low, high)
            case "uniform":
                value = random.uniform(low, high)
            case _:
                value = exp(random.uniform(log(low), log(high)))
        return min(max(float(f"{value:.{DIGITS}g}"), low), high)

    @model_serializer
    def _given(self) -> dict[str, Any]:
        return {self.kind: list(self.values)}

    @model_validator(mode="after")
    def _one_ordered_kind(self) -> "Parameter":
        given = [kind for kind in type(self).model_fields if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ConflictError(f"give one of {', '.join(type(self).model_fields)}", *given[1:])
        if not self.is_listed and self.values[0] >= self.values[1]:
            low, high = self.values
            raise ConflictError(f"the first number ({low:g}) must be below the second ({high:g})", self.kind)
        if self.log_uniform and self.log_uniform[0] <= 0:
            raise ConflictError(f"both numbers must be above 0, not {self.log_uniform[0]:g}", "log_uniform")
        return self


class Asha(Section):
    """Early stopping by asynchronous successive halving (ASHA, arXiv:1810.05934)."""

    grace_epochs: PositiveInt = 1
    """Epochs that every trial may train; then trials are compared, and again each time epochs have grown by the
    factor ``reduction``."""
    reduction: Annotated[float, Field(gt=1)] = 3
    """At each comparison the best 1/reduction of the trials so far go on."""


class SweepConfig(Section):
    """Trials of one run with other values of some of its keys."""

    name: RunName = "sweep"
    """Name of the sweep and of its folder; a sweep without ``--name`` gets this name and the time."""
    run: RunConfig
    """The run that is varied: a run's file, relative to the sweep's, or the run itself."""
    parameters: Annotated[dict[str, Parameter], Field(min_length=1)]
    """Dotted keys of the run, such as ``optimizer.lr``, and the values of each, in any order; a key inside another
    parameter's, as ``optimizer.lr`` beside ``optimizer``, varies only where the other's value leaves it open."""
    trials: PositiveInt = 1
    """Times that values are drawn; each time there is a trial for every point of the grids, all with the values that
    were drawn, so that the points can be compared; one if there are no grids. A sweep has at most 10,000 trials."""
    metric: str | None = None
    """Metric of the run, or ``loss``, by which trials are compared, by its value on the test split, or on
    ``run.validation`` if there is one; null takes the first metric, or the loss of a run that has none. Every
    trial must have it."""
    asha: Asha | None = None
    """Stop trials early that do worse than others after as many epochs; null trains all to their end."""
    concurrency: PositiveInt | None = None
    """Trials at a time; null takes as many as the cluster's CPUs and GPUs allow when the sweep starts, and all of them
    where the cluster grows by itself."""
    max_failures: NonNegativeInt = 2
    """Times that a trial goes on from its latest checkpoint after it was lost; errors in code are not retried."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the values that are drawn; the same seed gives the same trials. The trials' own seed is the run's."""
    storage: str = "runs"
    """Folder or URI below which the sweep's folder is made, with its trials' in it; all workers must reach it."""

    @property
    def ranking(self) -> Ranking:
        """The order of the trials."""
        return self.run.ranking_by(self.metric)

    def draw(self) -> list[dict[str, Any]]:
        """The parameters of every trial: with each draw, one for every point of the grids."""
        random = Random(self.seed)  # noqa: S311
        drawn = {key: parameter for key, parameter in self.parameters.items() if not parameter.grid}
        grids = {key: parameter.grid for key, parameter in self.parameters.items() if parameter.grid}
        points = [dict(zip(grids, point, strict=True)) for point in product(*grids.values())]
        trials = []
        for _ in range(self.trials):
            draw = {key: parameter.sample(random) for key, parameter in drawn.items()}
            trials += [{key: (draw | point)[key] for key in self.parameters} for point in points]
        return trials

    def probes(self) -> Iterator[dict[str, Any]]:
        """Parameters by which every listed value and both ends of every range come up."""
        values = {key: parameter.values for key, parameter in self.parameters.items()}
        for number in range(max(map(len, values.values()))):
            yield {key: each[min(number, len(each) - 1)] for key, each in values.items()}

    @model_validator(mode="after")
    def _trials_keep_their_place(self) -> "SweepConfig":
        for key in ("name", "storage"):
            if key in self.parameters:
                raise ConflictError(f"{key} cannot vary: it is where a trial's folder is", "parameters")
        return self

    @model_validator(mode="after")
    def _metric_is_there(self) -> "SweepConfig":
        try:
            self.run.ranking_by(self.metric)
        except ConflictError as error:
            raise ConflictError(str(error), "metric") from None
        return self

    @model_validator(mode="after")
    def _trials_can_be_counted(self) -> "SweepConfig":
        count = self.trials * prod(len(parameter.grid) for parameter in self.parameters.values() if parameter.grid)
        if count > MOST_TRIALS:
            raise ConflictError(
                f"{count:,} trials are more than the {MOST_TRIALS:,} that a sweep may have; draw fewer, or list less "
                "in the grids",
                "trials",
            )
        return self
