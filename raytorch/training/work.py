"""What a sample of a run takes, found out in its first step: operations and tokens, for the speed that is told."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from raytorch.config import RunConfig
from raytorch.datasets import MicroBatch
from raytorch.distributed.sharding import outline
from raytorch.distributed.worker import Worker, device_name
from raytorch.models.objectives import LossFunction
from raytorch.runs.metrics import Work
from raytorch.system.memory import peak_resident
from raytorch.training.flops import FlopCounter, counted
from raytorch.training.peaks import peak_flops
from raytorch.training.precision import Precision

logger = logging.getLogger("raytorch")


class WorkMeter:
    """Counts the operations of the first step on rank 0, and ``tell``s what a sample takes.

    A model that is compiled is counted on a copy without memory, as nothing is seen within it; one of the user's own
    is not, nor with a loss of their own, whose code might keep what it is given there.

    Example:
        >>> meter = WorkMeter(config, worker, precision, facts={"context": 256}, tell=throughput.tell)
        >>> with meter.counting(model, loss, micro_batches):  # of each step; only the first is counted
        ...     train_step(micro_batches)
    """

    def __init__(
        self,
        config: RunConfig,
        worker: Worker,
        precision: Precision,
        facts: Mapping[str, Any],
        tell: Callable[[Work], None],
    ) -> None:
        self._config, self._worker, self._precision, self._tell = config, worker, precision, tell
        context = facts.get("context")
        self._tokens = context if type(context) is int and context > 0 else None
        self._is_due = worker.rank == 0

    @contextmanager
    def counting(self, model: nn.Module, loss: LossFunction, micro_batches: Sequence[MicroBatch]) -> Iterator[None]:
        """Count the block as the training of these, if none was counted before."""
        if not self._is_due:
            yield
            return
        self._is_due = False
        if not self._config.compile:
            with FlopCounter() as counter:
                yield
            every = counter.total * self._worker.tensor  # of those that compute with the same samples
            self._tell_of(every, sum(batch.samples for batch in micro_batches))
            return
        is_own = any(":" in part.name for part in (self._config.model, self._config.loss))
        self._tell_of(None if is_own else apart(model, loss, micro_batches[0].content), micro_batches[0].samples)
        yield

    def _tell_of(self, flops: int | None, samples: int) -> None:
        name = device_name(self._worker.device)
        peak = peak_flops(name, self._precision.name, tf32=torch.backends.cuda.matmul.allow_tf32)
        each = flops / samples if flops and samples else None
        self._tell(Work(each, self._tokens, peak and peak * self._worker.world_size))


def apart(model: nn.Module, loss: LossFunction, content: Any) -> int | None:
    """Operations of a forward and backward pass of a batch; None where it cannot be computed without memory."""
    try:
        net = outline(model)
        batch = tree_map(lambda each: each.to("meta") if isinstance(each, Tensor) else each, content)
        return counted(lambda: torch.autograd.backward(_sum(loss(net, batch))))
    except Exception as error:
        logger.info("the operations of a step cannot be counted: %s", error)
        return None


def _sum(value: Any) -> Tensor:
    total: Tensor = (value[0] if isinstance(value, tuple) else value).sum()
    return total


def peak_memory(device: torch.device) -> int | None:
    """Bytes that tensors on a GPU have taken at most, or of a CPU's worker its whole process; None if it is not known.

    Example:
        >>> peak_memory(torch.device("cpu"))
        483729408
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return peak_resident()
