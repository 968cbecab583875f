"""Optimizers: those of ``torch.optim`` that need no more than parameters and gradients, with PyTorch's arguments."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, Strict, model_validator

from raytorch.config.section import ConflictError, Fraction, Section

Rate = Annotated[PositiveFloat, Field(description="Peak learning rate.")]
Betas = Annotated[
    tuple[Fraction, Fraction],
    Strict(False),
    Field(description="Decay of the running means of the gradient and of its square."),
]
Epsilon = Annotated[PositiveFloat, Field(description="Added to the denominator for stability.")]
Momentum = Annotated[Fraction, Field(description="Momentum factor.")]
L2Penalty = Annotated[NonNegativeFloat, Field(description="L2 penalty.")]
Decay = Annotated[NonNegativeFloat, Field(description="Decoupled weight decay.")]
IsDecoupled = Annotated[bool, Field(description="Apply the weight decay to the weights and not to the gradient.")]


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


Groups = Annotated[
    list[ParameterGroup],
    Field(
        description="Parameters with a rate or weight decay of their own; each is in the first group that its name "
        "matches."
    ),
]


class Sgd(Section):
    """torch.optim.SGD."""

    name: Literal["sgd"] = "sgd"
    """The optimizer."""
    lr: Rate = 0.1
    momentum: Momentum = 0.9
    dampening: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the gradient that is left out of the momentum."""
    nesterov: bool = False
    """Use Nesterov momentum."""
    weight_decay: L2Penalty = 0.0
    groups: Groups = []

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> "Sgd":
        if self.nesterov and not self.momentum:
            raise ConflictError("nesterov needs a momentum above 0", "nesterov", "momentum")
        if self.nesterov and self.dampening:
            raise ConflictError("nesterov needs a dampening of 0", "dampening", "nesterov")
        return self


class Asgd(Section):
    """torch.optim.ASGD, whose rate decays; the mean of the weights that it keeps is not evaluated: ``ema`` has one."""

    name: Literal["asgd"] = "asgd"
    """The optimizer."""
    lr: Rate = 1e-2
    lambd: NonNegativeFloat = 1e-4
    """Decay of weights and of the rate: at step t this is lr / (1 + lambd * lr * t)^alpha."""
    alpha: NonNegativeFloat = 0.75
    """Power of the rate's decay."""
    t0: NonNegativeFloat = 1e6
    """Steps after which the mean begins."""
    weight_decay: L2Penalty = 0.0
    groups: Groups = []


class Adam(Section):
    """torch.optim.Adam."""

    name: Literal["adam"] = "adam"
    """The optimizer."""
    lr: Rate = 1e-3
    betas: Betas = (0.9, 0.999)
    eps: Epsilon = 1e-8
    amsgrad: bool = False
    """Use the AMSGrad variant."""
    weight_decay: L2Penalty = 0.0
    groups: Groups = []


class AdamW(Adam):
    """torch.optim.AdamW."""

    name: Literal["adamw"] = "adamw"  # type: ignore[assignment]
    """The optimizer."""
    weight_decay: Decay = 0.01


class NAdam(Section):
    """torch.optim.NAdam, Adam with Nesterov momentum."""

    name: Literal["nadam"] = "nadam"
    """The optimizer."""
    lr: Rate = 2e-3
    betas: Betas = (0.9, 0.999)
    eps: Epsilon = 1e-8
    momentum_decay: NonNegativeFloat = 4e-3
    """How fast the momentum comes up to the first of the betas."""
    decoupled_weight_decay: IsDecoupled = False
    weight_decay: L2Penalty = 0.0
    groups: Groups = []


class RAdam(Section):
    """torch.optim.RAdam, Adam that waits until the mean of squares is known well enough."""

    name: Literal["radam"] = "radam"
    """The optimizer."""
    lr: Rate = 1e-3
    betas: Betas = (0.9, 0.999)
    eps: Epsilon = 1e-8
    decoupled_weight_decay: IsDecoupled = False
    weight_decay: L2Penalty = 0.0
    groups: Groups = []


class Adamax(Section):
    """torch.optim.Adamax, Adam with the largest gradient in place of the mean of squares."""

    name: Literal["adamax"] = "adamax"
    """The optimizer."""
    lr: Rate = 2e-3
    betas: Betas = (0.9, 0.999)
    eps: Epsilon = 1e-8
    weight_decay: L2Penalty = 0.0
    groups: Groups = []


class Adafactor(Section):
    """torch.optim.Adafactor, which remembers a row and a column of a matrix in place of all of it."""

    name: Literal["adafactor"] = "adafactor"
    """The optimizer."""
    lr: Rate = 1e-2
    """Largest relative step, and what the weight decay is multiplied by."""
    beta2_decay: Annotated[float, Field(le=0)] = -0.8
    """Power of the step with which the mean of squares forgets less and less."""
    eps: Annotated[tuple[PositiveFloat | None, PositiveFloat], Strict(False)] = (None, 1e-3)
    """Least denominator, null for that of the numbers' type, and least size of a parameter by which its steps are
    measured."""
    d: Annotated[float, Field(ge=1)] = 1.0
    """Size beyond which an update is scaled down."""
    weight_decay: Decay = 0.0
    groups: Groups = []


class Adagrad(Section):
    """torch.optim.Adagrad."""

    name: Literal["adagrad"] = "adagrad"
    """The optimizer."""
    lr: Rate = 1e-2
    lr_decay: NonNegativeFloat = 0.0
    """Decay of the rate: at step t it is lr / (1 + lr_decay * (t - 1))."""
    initial_accumulator_value: NonNegativeFloat = 0.0
    """What the sum of squared gradients begins with."""
    eps: Epsilon = 1e-10
    weight_decay: L2Penalty = 0.0
    groups: Groups = []


class Adadelta(Section):
    """torch.optim.Adadelta."""

    name: Literal["adadelta"] = "adadelta"
    """The optimizer."""
    lr: Rate = 1.0
    """Peak learning rate, by which the steps that it finds are multiplied."""
    rho: Fraction = 0.9
    """Decay of the running means of squared gradients and steps."""
    eps: Epsilon = 1e-6
    weight_decay: L2Penalty = 0.0
    groups: Groups = []


class RmsProp(Section):
    """torch.optim.RMSprop."""

    name: Literal["rmsprop"] = "rmsprop"
    """The optimizer."""
    lr: Rate = 1e-3
    alpha: Fraction = 0.99
    """Smoothing of the squared gradients."""
    eps: Epsilon = 1e-8
    momentum: Momentum = 0.0
    centered: bool = False
    """Normalize by the gradient's variance."""
    weight_decay: L2Penalty = 0.0
    groups: Groups = []


class Rprop(Section):
    """torch.optim.Rprop, which goes by the signs of gradients alone: for batches of all samples, or nearly all."""

    name: Literal["rprop"] = "rprop"
    """The optimizer."""
    lr: Rate = 1e-2
    """First step of each weight, which then finds its own; so there is no schedule."""
    etas: Annotated[
        tuple[Annotated[float, Field(gt=0, lt=1)], Annotated[float, Field(gt=1)]],
        Strict(False),
    ] = (0.5, 1.2)
    """Factors of a step where the sign of its gradient has changed, and where it has not."""
    step_sizes: Annotated[tuple[PositiveFloat, PositiveFloat], Strict(False)] = (1e-6, 50.0)
    """Smallest and largest step."""
    groups: Groups = []

    @model_validator(mode="after")
    def _is_consistent(self) -> "Rprop":
        smallest, largest = self.step_sizes
        if smallest > largest:
            raise ConflictError(
                f"the first number ({smallest:g}) must not exceed the second ({largest:g})", "step_sizes"
            )
        if any(group.weight_decay is not None for group in self.groups):
            raise ConflictError("rprop has no weight decay; leave weight_decay out", "groups")
        return self


class MuonOthers(Section):
    """What Muon is not made for, which torch.optim.AdamW trains beside it: all parameters that are no matrices."""

    match: list[Annotated[str, Field(min_length=1)]] = []
    """Patterns of the names of matrices that are trained so as well: embeddings and the last layer, in most cases."""
    lr: Rate = 1e-3
    betas: Betas = (0.9, 0.999)
    eps: Epsilon = 1e-8
    amsgrad: bool = False
    """Use the AMSGrad variant."""
    weight_decay: Decay = 0.01


class Muon(Section):
    """torch.optim.Muon of the matrices inside a model, whose updates are made orthogonal; AdamW of all others."""

    name: Literal["muon"] = "muon"
    """The optimizer."""
    lr: Rate = 1e-3
    momentum: Momentum = 0.95
    nesterov: bool = True
    """Use Nesterov momentum."""
    ns_coefficients: Annotated[tuple[float, float, float], Strict(False)] = (3.4445, -4.7750, 2.0315)
    """Coefficients of the Newton-Schulz iteration that makes updates orthogonal."""
    ns_steps: Annotated[int, Field(gt=0, lt=100)] = 5
    """Times that it is applied."""
    eps: Epsilon = 1e-7
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = "original"
    """How the rate depends on a matrix's shape: by the square root of its rows over its columns, but at least 1, or so
    that updates are as large as AdamW's and ``lr`` and ``weight_decay`` can be those of AdamW."""
    weight_decay: Decay = 0.1
    others: MuonOthers = MuonOthers()
    """AdamW of the other parameters."""
    groups: Groups = []


Optimizer = Annotated[
    Sgd | Asgd | Adam | AdamW | NAdam | RAdam | Adamax | Adafactor | Adagrad | Adadelta | RmsProp | Rprop | Muon,
    Field(discriminator="name"),
]


def peak_rates(optimizer: Optimizer) -> list[float]:
    """The learning rates that parameters of an optimizer may have before a schedule changes them.

    Example:
        >>> peak_rates(Sgd(lr=0.1, groups=[ParameterGroup(match="head.*", lr=0.5)]))
        [0.1, 0.5]
    """
    others = [optimizer.others.lr] if isinstance(optimizer, Muon) else []
    return [optimizer.lr, *others, *(group.lr for group in optimizer.groups if group.lr)]
