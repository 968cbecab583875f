"""The loss of a global batch, and its gradient, of whatever the micro-batches of all workers return."""

from typing import Any

import torch
from torch import Tensor, nn

from raytorch.config.metrics import LOSS_LABEL
from raytorch.datasets import MicroBatch
from raytorch.distributed.collectives import all_reduce
from raytorch.distributed.shards import own_parts
from raytorch.distributed.worker import Worker
from raytorch.errors import ConfigError
from raytorch.models.objectives import checked, ratio, valid_count

MOST_NAMES = 5
"""Parameters that a message tells."""


class BatchLoss:
    """The loss of one global batch after the other, as if a single worker had computed each at once.

    Numbers of samples are weighted by the samples that a micro-batch has, and DDP averages their gradients. How much
    the sums of ``(sum, count)`` weigh is known when all of the batch are counted: their gradients are divided then.
    """

    def __init__(self, model: nn.Module, worker: Worker) -> None:
        self._model, self._worker = model, worker
        self._loss = torch.zeros((), device=worker.device)
        self._counts: list[Tensor] = []
        self._has_counts: bool | None = None
        self._is_checked = False
        self._parts = 0
        self._last_part: _GradientsOfLastPart | None = None

    def part(self, value: Any, batch: MicroBatch) -> Tensor:
        """What to call ``backward`` on of a micro-batch, for which the loss returned ``value``.

        Raises:
            TypeError: It is none of the forms that a loss may return, or another than before.
            ValueError: It has no gradient.
        """
        returned = checked(value, max(1, batch.samples), LOSS_LABEL)
        losses, count = returned if isinstance(returned, tuple) else (returned, None)
        if self._has_counts not in (None, count is not None):
            raise TypeError("loss returned (sum, count) for some batches and a tensor for others; return one of them")
        self._has_counts = count is not None
        if not losses.requires_grad:
            raise ValueError("loss has no gradient; compute it by the model, without detach, item or no_grad")
        if count is None:
            part = losses.mean() * batch.weight
        else:
            is_here = float(batch.weight > 0)  # what keeps an idle worker in step is another worker's sample
            part = losses * is_here
            self._counts.append(valid_count(count).to(self._worker.device) * is_here)
        self._loss += part.detach()
        self._await_gradients()
        return part

    def finish(self) -> Tensor:
        """Finish the gradients after the last backward pass; returns the loss, whose mean over workers is the batch's.

        A collective operation where the loss returns ``(sum, count)``, for which no GPU is waited for but in the first
        step. A batch in which nothing is counted has a loss and gradients of 0. Raises ValueError for what is no count,
        on every worker, and ConfigError for parameters that have no gradient, or none of the last micro-batch, in which
        DDP waits for them.
        """
        if self._worker.world_size > 1:
            self._require_gradients()
        self._parts = 0
        loss, counts = self._loss, self._counts
        self._loss, self._counts = torch.zeros_like(loss), []
        if not counts:
            return loss
        count = all_reduce(torch.stack(counts).sum())
        gradients = [each.grad for each in self._model.parameters() if each.grad is not None]
        scaled = _without_waiting if self._is_checked else _at_once
        scaled(own_parts([loss, *gradients]), self._worker.world_size, count)
        self._is_checked = has_to_be_waited_for(self._worker.device)
        return loss

    def _await_gradients(self) -> None:
        """Note which parameters the next backward pass reaches, where those before it have left gradients in them."""
        self._parts += 1
        if self._worker.world_size > 1 and self._parts > 1:
            self._last_part = self._last_part or _GradientsOfLastPart(self._model)
            self._last_part.reached.clear()

    def _require_gradients(self) -> None:
        """DDP averages what the last backward pass reaches, and would go on with each worker's own of the rest."""
        _require(
            "", [name for name, each in self._model.named_parameters() if each.requires_grad and each.grad is None]
        )
        if self._last_part and self._parts > 1:
            _require(f" in the last of {self._parts} micro-batches (accumulate)", self._last_part.missing())


def has_to_be_waited_for(device: torch.device) -> bool:
    """Tell whether a number on it is known only when all is done that the device was given before."""
    return device.type != "cpu"


def _at_once(tensors: list[Tensor], workers: int, count: Tensor) -> None:
    """Divide by the count. Raises ValueError for what is none."""
    scale = ratio(workers, float(count), LOSS_LABEL)
    for tensor in tensors:
        tensor.mul_(scale) if scale else tensor.zero_()  # 0 * NaN is NaN


def _without_waiting(tensors: list[Tensor], workers: int, count: Tensor) -> None:
    """Divide by the count, whatever it is. What is none makes the loss NaN, which ends the run with its next line."""
    scale, is_none = workers / count, count == 0
    for tensor in tensors:
        tensor.mul_(scale.to(tensor.device)).masked_fill_(is_none.to(tensor.device), 0)


class _GradientsOfLastPart:
    """Which parameters the newest backward pass has reached."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self.reached: set[int] = set()
        parameter: Any  # whose method has no types
        for parameter in self._parameters.values():
            parameter.register_post_accumulate_grad_hook(lambda each: self.reached.add(id(each)))

    def missing(self) -> list[str]:
        """The names of those that it has not."""
        trained = {name: each for name, each in self._parameters.items() if each.requires_grad}
        return [name for name, each in trained.items() if id(each) not in self.reached]


def _require(where: str, unused: list[str]) -> None:
    if unused:
        more = f" and {len(unused) - MOST_NAMES} more" if len(unused) > MOST_NAMES else ""
        each = "the last micro-batch of each step" if where else "each step"
        raise ConfigError(
            f"model: the loss does not depend on {', '.join(unused[:MOST_NAMES])}{more}{where}; with several workers "
            f"every parameter needs a gradient in {each}: use it, call requires_grad_(False) on it as the model is "
            "made, add 0 times its sum to the loss where it is not used, or train with one worker"
        )
