"""Losses and learning-rate schedules."""

from typing import Annotated, Literal, get_args

from pydantic import (
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    Tag,
    model_validator,
)

from raytorch.config.own_parts import OwnLoss, own_or_shipped
from raytorch.config.section import ConflictError, Fraction, Section

LossName = Literal["cross_entropy", "bce", "bce_with_logits", "mse"]
LOSSES: tuple[str, ...] = get_args(LossName)


class Loss(Section):
    """The loss that training minimizes; ``bce``, ``bce_with_logits`` and ``mse`` compare with one-hot targets, and
    ``mse`` with numbers, where the targets are these."""

    name: LossName = "cross_entropy"
    """The loss; of classes ``bce`` and ``mse`` see the model's outputs through a sigmoid and a softmax."""
    label_smoothing: Fraction = 0.0
    """Share of each target spread evenly over all classes; for cross_entropy only."""

    @model_validator(mode="after")
    def _smoothing_needs_cross_entropy(self) -> "Loss":
        if self.label_smoothing and self.name != "cross_entropy":
            raise ConflictError(
                f"label_smoothing works with cross_entropy only, not with {self.name}; remove it",
                "label_smoothing",
                "name",
            )
        return self


LossPart = Annotated[
    Annotated[Loss, Tag("shipped")] | Annotated[OwnLoss, Tag("own")],
    Discriminator(own_or_shipped),
]


class Warmup(Section):
    """Base of all schedules."""

    name: str
    """The schedule."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps over which the learning rate rises linearly from near 0 to its first value."""


class ConstantSchedule(Warmup):
    """The same learning rate throughout."""

    name: Literal["constant"] = "constant"
    """The schedule."""


class StepSchedule(Warmup):
    """The learning rate is multiplied by ``factor`` every ``every_epochs``."""

    name: Literal["step"] = "step"
    """The schedule."""
    every_epochs: PositiveFloat = 1.0
    """Epochs between two changes; may be a fraction."""
    factor: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Multiplier at each change."""


class CosineSchedule(Warmup):
    """Half a cosine from the peak to ``final`` times the peak (SGDR, arXiv:1608.03983, without restarts)."""

    name: Literal["cosine"] = "cosine"
    """The schedule."""
    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Last learning rate, as a share of the peak."""


class OneCycleSchedule(Warmup):
    """Up to the peak and down again along cosines (Smith and Topin, arXiv:1708.07120)."""

    name: Literal["one_cycle"] = "one_cycle"
    """The schedule."""
    rise: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Share of the steps spent rising."""
    initial: Annotated[float, Field(gt=0, le=1)] = 0.04
    """First learning rate, as a share of the peak."""
    final: Annotated[float, Field(ge=0, le=1)] = 4e-6
    """Last learning rate, as a share of the peak."""


class PlateauSchedule(Warmup):
    """The learning rate is multiplied by ``factor`` when evaluations get no better: PyTorch's ReduceLROnPlateau."""

    name: Literal["plateau"] = "plateau"
    """The schedule."""
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Multiplier at each change."""
    patience: NonNegativeInt = 10
    """Evaluations in a row without a better one that are put up with; the next one changes the rate."""
    threshold: NonNegativeFloat = 1e-4
    """By which share of the best so far an evaluation has to be better to count."""
    cooldown: NonNegativeInt = 0
    """Evaluations after a change that are not counted."""
    min_lr: NonNegativeFloat = 0.0
    """Lowest learning rate, also of groups."""
    metric: str | None = None
    """Metric of the run, or ``loss``, that has to get better on the test split, or on ``validation`` if there is one;
    null takes the first metric, or the loss of a run that has none."""


Schedule = Annotated[
    ConstantSchedule | StepSchedule | CosineSchedule | OneCycleSchedule | PlateauSchedule, Field(discriminator="name")
]
