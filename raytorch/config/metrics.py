"""Metrics: what a model is judged by beside its loss, and the order of evaluations by one of them."""

import math
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Discriminator, Field, Tag, model_validator

from raytorch.config.own_parts import OwnPart, own_or_shipped
from raytorch.config.own_section import OwnSection
from raytorch.config.section import ConflictError, Section

LOSS_LABEL = "loss"
"""Label of the loss among what a model is judged by."""
RECORD_KEYS = ("step", "epoch", "split", "time")
"""Keys of a line of ``metrics.jsonl`` that say of what it is."""


class BaseMetric(Section):
    """A number by which the model is judged on the test split, beside its loss."""

    name: str
    """The metric."""
    better: Literal["higher", "lower"] = "higher"
    """The better of two values."""

    @property
    def label(self) -> str:
        """Name of its values in records and pictures: ``f1`` for the function f1 of a file, ``tagger.py:f1``."""
        return self.name.rpartition(":")[2]

    def is_called(self, name: str) -> bool:
        """Tell whether it has this label, or this name: also as a file says it, from a folder inside the project.

        Example:
            >>> OwnMetric(name="nets/tagger.py:f1").is_called("tagger.py:f1")
            True
        """
        given, own = PurePosixPath(name).parts, PurePosixPath(self.name).parts
        return name == self.label or given == own[-len(given) :]

    @model_validator(mode="after")
    def _label_is_free(self) -> "BaseMetric":
        if self.label in (LOSS_LABEL, *RECORD_KEYS):
            raise ConflictError(
                f"a metric cannot be called {self.label}, which metrics.jsonl has for something else; rename it", "name"
            )
        return self


OF_NUMBERS = ("mae",)
"""Metrics that go with any model where the targets are numbers."""
LOWER_IS_BETTER = frozenset({"bits_per_byte", "mae"})
"""Metrics of the models that ship of which a lower value is better, unless a run says otherwise."""


class Metric(BaseMetric):
    """A metric that the model brings."""

    name: Annotated[str, Field(pattern=r"^[^:./\\]+$", json_schema_extra={"patternErrorMessage": "a metric's name"})]
    """The metric: one of the model's own."""

    @model_validator(mode="before")
    @classmethod
    def _known_are_better_lower(cls, section: Any) -> Any:
        is_known = isinstance(section, dict) and section.get("name") in LOWER_IS_BETTER
        return {"better": "lower", **section} if is_known else section


class OwnMetric(BaseMetric, OwnPart):
    """A metric of the user's own: a function of a model and a batch, see :mod:`raytorch.models.objectives`, or what
    makes a ``torchmetrics.Metric``, see :mod:`raytorch.models.stateful_metrics`."""

    model_config = OwnPart.model_config

    called_with: ClassVar[tuple[str, ...]] = ("the model", "a batch")
    """A function; what makes a metric is given nothing."""


class OwnMetricSection(BaseMetric, OwnSection):
    """Base of the sections of own metrics whose signature is known."""


MetricPart = Annotated[
    Annotated[Metric, Tag("shipped")] | Annotated[OwnMetric, Tag("own")],
    Discriminator(own_or_shipped),
]


class Ranking(NamedTuple):
    """The order of evaluations by one of their numbers."""

    label: str
    """The number's name in an evaluation."""
    higher_is_better: bool

    def score(self, metrics: Mapping[str, float]) -> float:
        """How good an evaluation is: the higher the better, and minus infinity without the number, or for NaN.

        Example:
            >>> Ranking("loss", higher_is_better=False).score({"loss": 0.25})
            -0.25
        """
        value = metrics.get(self.label, math.nan) * (1 if self.higher_is_better else -1)
        return -math.inf if math.isnan(value) else value
