"""Where the time of a worker's training steps goes: waiting for data, waiting for other workers, computing."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from raytorch.datasets import MicroBatch

Moment = Any
"""A point in time: on a CPU the clock's seconds, on a GPU an event in the stream of its work."""


class StepTotals(NamedTuple):
    """Sums over a worker's timed steps."""

    steps: int
    samples: int
    """Of this worker."""
    seconds: float
    """From the request of the first batch to the end of the last step, without what lies between two epochs."""
    data: float
    """Seconds of them until a batch was there."""
    communication: float | None
    """Seconds of them from this worker's last gradient until it had the average over all workers; None if no backward
    pass was timed."""


@dataclass
class _Step:
    samples: int
    begun: Moment
    ready: Moment
    waits: list[tuple[Moment, Moment]] = field(default_factory=list)
    ended: Moment | None = None


class StepTimer:
    """Times the optimizer steps of one worker. A step lasts from the request of its batch to that of the next.

    Communication is what the worker waits for beyond its own computing: the time from its own last gradient of a
    backward pass until DDP, in that pass, has the average over all workers. Averaging that goes on beside the
    backward pass delays nothing and is not counted, though on CPUs it takes computing power from it; waiting for a
    slower worker is counted, on the faster one. A worker on its own has next to none.

    On a GPU, times are those of its stream of work and not those of the Python code that runs ahead of it. No step is
    waited for before :meth:`totals`.

    All this follows from PyTorch's public hooks. DDP's own figures (``_get_ddp_logging_data``) come to nearly the
    same, but are private, and sampled.
    """

    def __init__(self, device: torch.device) -> None:
        """``device`` is the one that the worker trains on."""
        self._on_gpu = device.type == "cuda"
        self._last_gradient = self._now()
        self._steps: list[_Step] = []

    def watch(self, model: nn.Module) -> None:
        """Time the gradients of a model: what DDP holds, or its parameters' owner."""
        for parameter in model.parameters():
            if parameter.requires_grad:
                # Runs before DDP's own hook, which starts the averaging and ends the pass with waiting for it.
                parameter.register_post_accumulate_grad_hook(self._gradient_is_there)  # type: ignore[no-untyped-call]

    def steps(self, batches: Iterable[list[MicroBatch]]) -> Iterator[list[MicroBatch]]:
        """Iterate over the batches of consecutive steps; a step after which no batch is asked for is not counted."""
        begun = self._now()
        for batch in batches:
            samples = sum(part.samples for part in batch)
            step = _Step(samples, begun, self._now())
            self._steps.append(step)
            yield batch
            step.ended = begun = self._now()

    def backward(self, loss: Tensor) -> None:
        """The backward pass from ``loss``, within one of :meth:`steps`."""
        torch.autograd.backward(loss)
        self._steps[-1].waits.append((self._last_gradient, self._now()))

    def totals(self, warmup: int = 0) -> StepTotals:
        """Add up the complete steps after the first ``warmup``."""
        if self._on_gpu:
            torch.cuda.synchronize()
        steps = [step for step in self._steps[warmup:] if step.ended is not None]
        waits = [wait for step in steps for wait in step.waits]
        return StepTotals(
            steps=len(steps),
            samples=sum(step.samples for step in steps),
            seconds=sum(_seconds(step.begun, step.ended) for step in steps if step.ended is not None),
            data=sum(_seconds(step.begun, step.ready) for step in steps),
            communication=sum(_seconds(*wait) for wait in waits) if waits or not steps else None,
        )

    def _gradient_is_there(self, _: Tensor) -> None:
        self._last_gradient = self._now()

    def _now(self) -> Moment:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def _seconds(begin: Moment, end: Moment) -> float:
    return float(begin.elapsed_time(end) / 1000 if isinstance(begin, torch.cuda.Event) else end - begin)
