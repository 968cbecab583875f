"""Learning-rate schedules, with warm-up, and the rates of an optimizer that follow them."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from raytorch.config import CosineSchedule, OneCycleSchedule, PlateauSchedule, Ranking, Schedule, StepSchedule
from raytorch.config.metrics import LOSS_LABEL
from raytorch.errors import CheckpointError, ConfigError

SMALLEST_CHANGE = 1e-8
"""Of a rate on a plateau; what is less is none, as in PyTorch."""


def build_schedule(
    config: Schedule,
    optimizer: torch.optim.Optimizer,
    *,
    total_steps: int,
    steps_per_epoch: int,
    ranking: Ranking | None = None,
) -> "RateSchedule":
    """Schedule ``optimizer``, whose rates are the peaks; call the result's ``step`` after every optimizer step.

    A plateau goes by ``ranking``, by default by the loss, the others by :func:`schedule_factor` alone. Raises
    ConfigError.
    """
    factor = schedule_factor(config, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
    peaks = [float(group["lr"]) for group in optimizer.param_groups]
    order = ranking or Ranking(LOSS_LABEL, higher_is_better=False)
    plateau = Plateau(config, peaks, order) if isinstance(config, PlateauSchedule) else None
    return RateSchedule(optimizer, factor, plateau)


class RateSchedule:
    """Sets the rate of each group of an optimizer: its peak, or what a plateau has left of it, times a factor."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, factor: Callable[[int], float], plateau: "Plateau | None" = None
    ) -> None:
        self._optimizer, self._factor, self._plateau = optimizer, factor, plateau
        self._peaks = [float(group["lr"]) for group in optimizer.param_groups]
        self._go_to(0)

    def step(self) -> None:
        """Count an optimizer step."""
        self._go_to(self._done + 1)

    def after_evaluation(self, metrics: Mapping[str, float]) -> None:
        """Take an evaluation into account, as a plateau does; the next step has the new rate."""
        if self._plateau:
            self._plateau.look(metrics)
            self._go_to(self._done)

    def get_last_lr(self) -> list[float]:
        """The rates of the groups, as PyTorch's schedulers tell them."""
        return [float(group["lr"]) for group in self._optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """What does not follow from the number of steps, as JSON has it."""
        return self._plateau.state_dict() if self._plateau else {}

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Go on after ``step`` steps, from the :meth:`state_dict` of a run of any schedule. Raises CheckpointError."""
        if self._plateau and state:
            self._plateau.load_state_dict(state)
        self._go_to(step)

    def _go_to(self, step: int) -> None:
        self._done = step
        rates = self._plateau.rates if self._plateau else self._peaks
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * self._factor(step)


class Plateau:
    """Lowers rates when evaluations get no better, as PyTorch's ReduceLROnPlateau does.

    Attributes:
        rates: What is left of the peaks, one for each group.
    """

    def __init__(self, config: PlateauSchedule, peaks: Sequence[float], ranking: Ranking) -> None:
        self._config, self._ranking, self._peaks = config, ranking, list(peaks)
        self.rates = list(peaks)
        self._best: float | None = None
        self._waited = 0
        self._cooling = 0

    def look(self, metrics: Mapping[str, float]) -> None:
        """Take an evaluation into account."""
        value = metrics[self._ranking.label]
        if self._is_better(value):
            self._best, self._waited = value, 0
        else:
            self._waited += 1
        if self._cooling:
            self._cooling, self._waited = self._cooling - 1, 0
        if self._waited > self._config.patience:
            self._cooling, self._waited = self._config.cooldown, 0
            self.rates = [self._lowered(rate) for rate in self.rates]

    def _is_better(self, value: float) -> bool:
        if self._best is None:
            return not math.isnan(value)
        if self._ranking.higher_is_better:
            return value > self._best * (1.0 + self._config.threshold)
        return value < self._best * (1.0 - self._config.threshold)

    def _lowered(self, rate: float) -> float:
        lower = max(rate * self._config.factor, self._config.min_lr)
        return lower if rate - lower > SMALLEST_CHANGE else rate

    def state_dict(self) -> dict[str, Any]:
        """What has been seen and done, as JSON has it."""
        return {
            "metric": list(self._ranking),
            "best": self._best,
            "waited": self._waited,
            "cooling": self._cooling,
            "peaks": self._peaks,
            "rates": self.rates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken. Raises CheckpointError.

        With another metric, evaluations are counted anew; other peaks, or other groups, are as much lower as the last.
        """
        if not _is_plateau(state):
            raise CheckpointError(f"the checkpoint's plateau, {dict(state)!r:.99}, is damaged")
        peaks, rates = state["peaks"], state["rates"]
        share = rates[-1] / peaks[-1]
        self.rates = list(rates) if peaks == self._peaks else [peak * share for peak in self._peaks]
        if state["metric"] == list(self._ranking):
            self._best, self._waited, self._cooling = state["best"], state["waited"], state["cooling"]


def _is_plateau(state: Mapping[str, Any]) -> bool:
    peaks, rates, best = (state.get(key) for key in ("peaks", "rates", "best"))
    if not (isinstance(peaks, list) and isinstance(rates, list) and 0 < len(peaks) == len(rates)):
        return False
    return (
        all(isinstance(rate, float) and rate > 0 for rate in (*peaks, *rates))
        and all(type(state.get(key)) is int and state[key] >= 0 for key in ("waited", "cooling"))
        and isinstance(best, float | None)
        and "metric" in state
    )


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
