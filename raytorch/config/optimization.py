"""Losses, optimizers and learning-rate schedules."""

from typing import Annotated, Literal, get_args

from pydantic import (
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    Strict,
    Tag,
    model_validator,
)

from raytorch.config.own_parts import OwnLoss, own_or_shipped
from raytorch.config.section import ConflictError, Fraction, Section

LossName = Literal["cross_entropy", "bce", "bce_with_logits", "mse"]
LOSSES: tuple[str, ...] = get_args(LossName)


class Loss(Section):
    """The loss that training minimizes; ``bce``, ``bce_with_logits`` and ``mse`` compare with one-hot targets."""

    name: LossName = "cross_entropy"
    """The loss; ``bce`` and ``mse`` see the model's outputs through a sigmoid and a softmax."""
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


class ParameterGroup(Section):
    """Parameters that are trained with other settings than the rest."""

    match: Annotated[str, Field(min_length=1)]
    """Pattern of their dotted names, in which ``*`` stands for any text: ``*.bias``, ``stem.*``."""
    lr: PositiveFloat | None = None
    """Peak learning rate; by default the optimizer's."""
    weight_decay: NonNegativeFloat | None = None
    """By default the optimizer's."""

    @model_validator(mode="after")
    def _sets_something(self) -> "ParameterGroup":
        if self.lr is None and self.weight_decay is None:
            raise ConflictError("give lr or weight_decay: the group has the optimizer's own otherwise", "match")
        return self


class Sgd(Section):
    """torch.optim.SGD."""

    name: Literal["sgd"] = "sgd"
    """The optimizer."""
    lr: PositiveFloat = 0.1
    """Peak learning rate."""
    momentum: Fraction = 0.9
    """Momentum factor."""
    nesterov: bool = False
    """Use Nesterov momentum."""
    weight_decay: NonNegativeFloat = 0.0
    """L2 penalty."""
    groups: list[ParameterGroup] = []
    """Parameters with a rate or weight decay of their own; each is in the first group that its name matches."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> "Sgd":
        if self.nesterov and not self.momentum:
            raise ConflictError("nesterov needs a momentum above 0", "nesterov", "momentum")
        return self


class RmsProp(Section):
    """torch.optim.RMSprop."""

    name: Literal["rmsprop"] = "rmsprop"
    """The optimizer."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate."""
    alpha: Fraction = 0.99
    """Smoothing of the squared gradients."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator for stability."""
    momentum: Fraction = 0.0
    """Momentum factor."""
    centered: bool = False
    """Normalize by the gradient's variance."""
    weight_decay: NonNegativeFloat = 0.0
    """L2 penalty."""
    groups: list[ParameterGroup] = []
    """Parameters with a rate or weight decay of their own; each is in the first group that its name matches."""


class Adam(Section):
    """torch.optim.Adam."""

    name: Literal["adam"] = "adam"
    """The optimizer."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate."""
    betas: Annotated[tuple[Fraction, Fraction], Strict(False)] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator for stability."""
    amsgrad: bool = False
    """Use the AMSGrad variant."""
    weight_decay: NonNegativeFloat = 0.0
    """L2 penalty."""
    groups: list[ParameterGroup] = []
    """Parameters with a rate or weight decay of their own; each is in the first group that its name matches."""


class AdamW(Adam):
    """torch.optim.AdamW."""

    name: Literal["adamw"] = "adamw"  # type: ignore[assignment]
    """The optimizer."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay."""


Optimizer = Annotated[Sgd | RmsProp | Adam | AdamW, Field(discriminator="name")]


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


Schedule = Annotated[ConstantSchedule | StepSchedule | CosineSchedule | OneCycleSchedule, Field(discriminator="name")]
