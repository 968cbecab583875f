"""Optimizers by the names that configs and sessions use, and learning-rate schedules with warm-up."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from raytorch.config import CosineSchedule, OneCycleSchedule, Optimizer, Schedule, StepSchedule
from raytorch.errors import CheckpointError, ConfigError

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
"""Every optimizer by name: PyTorch's own classes."""


def build_optimizer(config: Optimizer, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Build the optimizer that ``config`` names; its other fields are the class's keyword arguments.

    Example:
        >>> from raytorch.config import AdamW
        >>> optimizer = build_optimizer(AdamW(lr=0.01), nn.Linear(2, 2).parameters())
    """
    return OPTIMIZERS[config.name](params, **config.model_dump(exclude={"name"}))


def optimizer_state(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return what ``optimizer`` remembers of each of its parameters, in their order; its settings are not among it."""
    state = optimizer.state_dict()["state"]
    return [state.get(number, {}) for number, _ in enumerate(_parameters(optimizer))]


def restore_optimizer(optimizer: torch.optim.Optimizer, remembered: list[dict[str, Any]]) -> None:
    """Give ``optimizer``, whose settings stay as they are, what :func:`optimizer_state` took from one like it.

    What only its present settings need (a momentum that was 0, say) begins with zeros. Raises CheckpointError for what
    was taken from another kind of optimizer, or one of other parameters.
    """
    parameters = _parameters(optimizer)
    if len(remembered) != len(parameters):
        raise CheckpointError(
            f"the checkpoint's optimizer has {len(remembered)} parameters, the model {len(parameters)}; resume with "
            "the model of the run that saved it"
        )
    names = _remembered_names(optimizer)
    state = {number: _fitted(parameters[number], there, names) for number, there in enumerate(remembered) if there}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _remembered_names(optimizer: torch.optim.Optimizer) -> set[str]:
    """Return what an optimizer of these settings remembers of a parameter, as one that takes a step shows."""
    probe = nn.Parameter(torch.zeros(1))
    probe.grad = torch.zeros(1)
    build: Any = type(optimizer)
    shown = build([probe])
    shown.param_groups[0] |= {name: optimizer.param_groups[0][name] for name in optimizer.defaults}
    shown.step()
    return {name for name, value in shown.state[probe].items() if value is not None}


def _fitted(parameter: Tensor, there: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """The state of one parameter, in its own layout in memory, where an optimizer is faster."""
    if isinstance(there.get("step"), Tensor) != ("step" in names):
        raise CheckpointError("the checkpoint is of another kind of optimizer; resume with the optimizer of its run")
    fitted: dict[str, Any] = {}
    for name in sorted(names):
        value = there.get(name)
        if name == "step" or value is None:
            fitted[name] = torch.zeros_like(parameter) if value is None else value
        elif not isinstance(value, Tensor) or value.shape != parameter.shape:
            raise CheckpointError(f"the checkpoint's {name} does not fit the model; resume with the model of its run")
        else:
            fitted[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    return fitted


def build_schedule(
    config: Schedule, optimizer: torch.optim.Optimizer, *, total_steps: int, steps_per_epoch: int, step: int = 0
) -> LambdaLR:
    """Schedule ``optimizer`` by :func:`schedule_factor`; call the result's ``step`` after every optimizer step.

    With a ``step`` it goes on after so many, for an optimizer that has been scheduled before.
    """
    factor = schedule_factor(config, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
    return LambdaLR(optimizer, factor, last_epoch=step - 1)


def schedule_factor(config: Schedule, *, total_steps: int, steps_per_epoch: int) -> Callable[[int], float]:
    """Return the function from the number of optimizer steps done to the factor of the peak learning rate.

    The schedule spans the steps that warm-up leaves and keeps its last value from there on. It equals PyTorch's StepLR,
    CosineAnnealingLR or OneCycleLR (``anneal_strategy="cos"``), and the warm-up its LinearLR with
    ``start_factor=1 / (warmup_steps + 1)``.

    Args:
        config: Schedule and number of warm-up steps.
        total_steps: Optimizer steps of the whole run, warm-up included.
        steps_per_epoch: Optimizer steps of one epoch.

    Raises:
        ConfigError: Warm-up leaves no step to the schedule.
    """
    warmup = config.warmup_steps
    span = total_steps - warmup
    if span < 1:
        raise ConfigError(f"schedule.warmup_steps ({warmup}) must be below the steps of the run ({total_steps})")
    shape = _shape(config, span, steps_per_epoch)

    def factor(step: int) -> float:
        if step < warmup:
            return shape(0) * (step + 1) / (warmup + 1)
        return shape(min(step - warmup, span))

    return factor


def _shape(config: Schedule, span: int, steps_per_epoch: int) -> Callable[[int], float]:
    """Return the schedule after warm-up, from step 0 to step ``span``."""
    match config:
        case StepSchedule(factor=factor):
            every = max(1, round(config.every_epochs * steps_per_epoch))
            return lambda step: factor ** (step // every)
        case CosineSchedule():
            return lambda step: _cosine(1.0, config.final, step / span)
        case OneCycleSchedule():
            peak = config.rise * span - 1  # may be fractional, and negative in a short run, as in OneCycleLR
            return lambda step: (
                _cosine(config.initial, 1.0, step / peak)
                if step < peak
                else _cosine(1.0, config.final, min(1.0, (step - peak) / (span - 1 - peak)))
            )
        case _:
            return lambda step: 1.0


def _cosine(start: float, end: float, share: float) -> float:
    """Go from ``start`` to ``end`` along half a cosine as ``share`` goes from 0 to 1."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
