"""Learning-rate schedules, with warm-up."""

import math
from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import LambdaLR

from raytorch.config import CosineSchedule, OneCycleSchedule, Schedule, StepSchedule
from raytorch.errors import ConfigError


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
