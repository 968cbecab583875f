"""Numbers that a loop logs step by step, averaged over the workers when they are written."""

import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from raytorch.config.metrics import RECORD_KEYS
from raytorch.distributed.collectives import all_gather, all_reduce
from raytorch.distributed.worker import Worker
from raytorch.errors import UserError
from raytorch.models.objectives import judged_ratio
from raytorch.runs.metrics import PACE_KEYS

LONGEST_NAME = 250
"""Characters of a number's name."""
Number = float | Tensor
"""A number, or a tensor of one element."""


class StepLog:
    """What is logged between two lines of a run's metrics, by name and step, on this worker."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._values: dict[str, list[Tensor]] = {}
        self._steps: dict[str, list[int]] = {}

    def add(self, step: int, values: Mapping[str, Number]) -> None:
        """Keep the numbers of an optimizer step; nothing waits for the device. Raises TypeError for what is none."""
        require_names("run.log", values)
        for name, value in values.items():
            self._values.setdefault(name, []).append(_single(name, value))
            self._steps.setdefault(name, []).append(step)

    def take(self) -> dict[str, list[tuple[int, float]]]:
        """The means over the workers of all that was kept since the last call, with their steps. Collective.

        Raises ValueError, on every worker, where the workers have kept numbers of other names or steps.
        """
        values, steps = self._values, self._steps
        self._values, self._steps = {}, {}
        device = self._worker.device
        require_the_same(self._worker, str(sorted(steps.items())), "run.log")
        if not values:
            return {}
        names = sorted(values)
        flat = torch.cat([torch.stack([each.to(device, torch.float64) for each in values[name]]) for name in names])
        means = iter((all_reduce(flat) / self._worker.world_size).tolist())
        return {name: [(step, next(means)) for step in steps[name]] for name in names}


def reduced(worker: Worker, values: Mapping[str, Number | tuple[Number, Number]], asked: str) -> dict[str, float]:
    """One number by name over all workers: the mean, of ``(sum, count)`` the sum of all sums by that of all counts.

    A collective operation. NaN where nothing was counted. Raises ValueError, on every worker, where their names differ,
    or where nothing was counted for the loss.
    """
    require_names(asked, values)
    pairs = {name: value if isinstance(value, tuple) else (value,) for name, value in values.items()}
    for name, pair in pairs.items():
        if len(pair) not in (1, 2):
            raise TypeError(f"{asked}: {name} must be a number or (sum, count), not {len(pair)} numbers")
    require_the_same(worker, str([(name, len(pair)) for name, pair in pairs.items()]), asked)
    if not pairs:
        return {}
    parts = [_single(name, part).to(worker.device, torch.float64) for name, pair in pairs.items() for part in pair]
    told = iter(zip(*all_gather(torch.stack(parts)).tolist(), strict=True))  # by number, of every worker
    return {name: _mean(next(told)) if len(pair) == 1 else _ratio(name, told) for name, pair in pairs.items()}


def _mean(numbers: tuple[float, ...]) -> float:
    """To the bit that of each worker where it is the same on all of them, as that of three times 0.1 would not be."""
    return numbers[0] if len(set(numbers)) == 1 else math.fsum(numbers) / len(numbers)


def _ratio(name: str, told: Iterator[tuple[float, ...]]) -> float:
    return judged_ratio(sum(next(told)), sum(next(told)), name)


def require_names(call: str, names: Iterable[str]) -> None:
    """Refuse names that a line of metrics has for something else, or no room for. Raises UserError."""
    for name in names:
        if len(name) > LONGEST_NAME:
            raise UserError(f"{call}: a number's name has at most {LONGEST_NAME} characters, not {name!r:.40}...")
        if name in (*RECORD_KEYS, *PACE_KEYS):
            raise UserError(f"{call}: a number cannot be called {name}, which metrics.jsonl has for something else")


def require_the_same(worker: Worker, text: str, asked: str) -> None:
    """Refuse what differs between the workers, before they would wait for each other for ever. Collective.

    Raises ValueError on every worker. What has another length is always found, other words but for one time in 65,521.
    """
    if worker.world_size == 1:
        return
    marks = torch.tensor([zlib.crc32(text.encode()) % 65_521, len(text)], dtype=torch.float64, device=worker.device)
    sums = all_reduce(torch.cat([marks, marks**2]))
    if not torch.equal(sums[:2] ** 2, sums[2:] * worker.world_size):
        raise ValueError(
            f"{asked} was given something else on another worker, or at another step; call it on all of them alike: "
            f"here it was {text:.500}"
        )


def _single(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.detach().reshape(())
    if isinstance(value, int | float):
        return torch.tensor(float(value), dtype=torch.float64, device="cpu")
    try:
        return torch.tensor(float(value), dtype=torch.float64, device="cpu")  # of numpy, say
    except (TypeError, ValueError):
        told = f"a tensor of shape {(*value.shape,)}; give its mean" if isinstance(value, Tensor) else f"{value!r:.99}"
        raise TypeError(f"{name} must be a number or a tensor of one element, not {told}") from None
