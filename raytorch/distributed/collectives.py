"""Collectives over tensors: those of ``torch.distributed``, over all workers of the group.

In a process without a process group, or alone in it, they give what a group of one gives. No gradient flows through
them. A tensor may have any strides, where gloo would silently misread it.

On CPUs the workers first compare what they are about to do, at the cost of one more small message: where they differ,
each of them raises the same error and the group stays usable, whereas gloo would kill a worker, wait for its timeout or
misread memory. On GPUs the host would have to wait for the device: there, ``TORCH_DISTRIBUTED_DEBUG=DETAIL`` finds out.
The workers of a session compare it in another way, on GPUs too: see :class:`Agreement`.
"""

import zlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from raytorch.errors import UserError
from raytorch.tensor_ops import overridable

_REDUCTIONS = {
    "sum": dist.ReduceOp.SUM,
    "mean": dist.ReduceOp.AVG,
    "product": dist.ReduceOp.PRODUCT,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
}


class Agreement(Protocol):
    """How workers that can fail one by one, and go on, find out whether all of them are about to do the same."""

    world_size: int
    """Number of workers."""
    averages_gradients: bool
    """True if a backward pass may communicate."""

    @property
    def has_left(self) -> bool:
        """True if this worker has left the process group, until the next agreement."""

    def agree(self, what: str) -> None:
        """Wait until all workers are about to do ``what``. Raises an error on each of them if one is not."""


_agreement: Agreement | None = None


def agree_through(agreement: Agreement | None) -> None:
    """Have the workers of this process's group agree in that way from now on."""
    global _agreement
    _agreement = agreement


def agreement() -> Agreement | None:
    """How the workers agree, other than by the collectives themselves."""
    return _agreement


@overridable
def all_reduce(tensor: Tensor, op: str = "sum") -> Tensor:
    """Reduce ``tensor`` over all workers, element by element, in place, and return it.

    See ``torch.distributed.all_reduce``.

    Args:
        tensor: Of the same shape and dtype on all workers.
        op: ``sum``, ``mean``, ``product``, ``min`` or ``max``.

    Raises:
        UserError: There is no such ``op``, it is the mean of integers, or the workers disagree.

    Example:
        >>> all_reduce(torch.tensor([1.0, 2.0]), "max")  # of a group of one
        tensor([1., 2.])
    """
    reduction = _reduction(op, tensor)
    if _world_size() > 1:
        _require_agreement(f"all_reduce({op})", tensor)
        _in_place(tensor, lambda dense: dist.all_reduce(dense, reduction))
    return tensor


@overridable
def all_gather(tensor: Tensor) -> Tensor:
    """``tensor`` (...) of every worker in the order of ranks, as a new tensor (world size, ...).

    See ``torch.distributed.all_gather_into_tensor``.

    Args:
        tensor: Of the same shape and dtype on all workers.

    Raises:
        UserError: The workers disagree.

    Example:
        >>> all_gather(torch.tensor([1.0, 2.0])).shape
        torch.Size([1, 2])
    """
    own = tensor.detach().contiguous()
    if _world_size() == 1:
        return own.unsqueeze(0).clone()
    _require_agreement("all_gather", own)
    gathered = own.new_empty((_world_size(), *own.shape))
    dist.all_gather_into_tensor(gathered.view(-1), own.view(-1))
    return gathered


@overridable
def broadcast(tensor: Tensor, src: int = 0) -> Tensor:
    """Overwrite ``tensor`` with that of rank ``src``, in place, and return it. See ``torch.distributed.broadcast``.

    Args:
        tensor: Of the same shape and dtype on all workers.
        src: A rank.

    Raises:
        UserError: There is no rank ``src``, or the workers disagree.

    Example:
        >>> broadcast(torch.tensor([1.0, 2.0]), src=0)
        tensor([1., 2.])
    """
    if not 0 <= src < _world_size():
        raise UserError(f"broadcast: src must be a rank from 0 to {_world_size() - 1}, not {src}")
    if _world_size() > 1:
        _require_agreement(f"broadcast(src={src})", tensor)
        _in_place(tensor, lambda dense: dist.broadcast(dense, src))
    return tensor


@overridable
def reduce_scatter(tensor: Tensor | Sequence[Tensor], op: str = "sum") -> Tensor:
    """Reduce over all workers, element by element, and return this rank's part as a new tensor.

    See ``torch.distributed.reduce_scatter_tensor`` and ``reduce_scatter``.

    Args:
        tensor: (world size * n, ...), of which each rank gets (n, ...) in the order of ranks; or a list of a tensor per
            rank. Of the same shape and dtype on all workers.
        op: ``sum``, ``mean``, ``product``, ``min`` or ``max``.

    Raises:
        UserError: There is no such ``op``, it is the mean of integers, there is not a part for every rank, or the
            workers disagree.

    Example:
        >>> reduce_scatter([torch.tensor([1.0, 2.0])])  # a tensor per rank
        tensor([1., 2.])
    """
    parts = _parts(tensor)
    reduction = _reduction(op, parts)
    if _world_size() == 1:
        return parts[0].clone()
    _require_agreement(f"reduce_scatter({op})", parts)
    part = parts.new_empty(parts.shape[1:])
    dist.reduce_scatter_tensor(part.view(-1), parts.view(-1), reduction)
    return part


def gather_objects(value: Any) -> list[Any]:
    """What every worker gives, in the order of ranks; it travels pickled, from one worker of the group to the others.

    Example:
        >>> gather_objects("mine")  # of a group of one
        ['mine']
    """
    if _world_size() == 1:
        return [value]
    every: list[Any] = [None] * _world_size()
    dist.all_gather_object(every, value)
    return every


def _world_size() -> int:
    if _agreement and _agreement.has_left:
        return _agreement.world_size
    return dist.get_world_size() if dist.is_initialized() else 1


def _reduction(op: str, tensor: Tensor) -> Any:
    if op not in _REDUCTIONS:
        raise UserError(f"op must be one of {', '.join(_REDUCTIONS)}, not {op!r}")
    if op == "mean" and not (tensor.is_floating_point() or tensor.is_complex()):
        raise UserError(f"the mean of {tensor.dtype} is not an integer: convert the tensor to float first")
    return _REDUCTIONS[op]


def _parts(tensor: Tensor | Sequence[Tensor]) -> Tensor:
    """A part per rank, (world size, ...), contiguous."""
    world_size = _world_size()
    if not isinstance(tensor, Tensor):
        if len(tensor) != world_size:
            raise UserError(f"reduce_scatter: the list must hold a tensor per rank, {world_size}, not {len(tensor)}")
        return torch.stack(list(tensor)).detach()
    if not tensor.dim() or len(tensor) % world_size:
        raise UserError(
            f"reduce_scatter: the first dimension of {tuple(tensor.shape)} must be a multiple of {world_size}, the "
            "number of workers"
        )
    return tensor.detach().contiguous().view(world_size, len(tensor) // world_size, *tensor.shape[1:])


def _in_place(tensor: Tensor, collective: Callable[[Tensor], object]) -> None:
    """Apply a collective to ``tensor``'s elements; by itself it takes them from memory front to back."""
    target = tensor.detach()
    dense = target.contiguous()
    collective(dense)
    if dense is not target:
        target.copy_(dense)
    torch.autograd.graph.increment_version(tensor)  # a graph that needs the old elements is to notice


def _require_agreement(call: str, tensor: Tensor) -> None:
    """Raise on every worker if they do not all make the same call for the same shape and dtype."""
    call = f"{call} of {tensor.dtype} {tuple(tensor.shape)}".replace("torch.", "")
    if _agreement:
        _agreement.agree(call)
        return
    if tensor.device.type != "cpu":
        return
    own = torch.tensor([zlib.crc32(call.encode())])
    every = own.new_empty(_world_size())
    dist.all_gather_into_tensor(every, own)
    if (every != own).any():
        calls: list[Any] = [None] * len(every)
        dist.all_gather_object(calls, call)
        raise UserError("the workers disagree: " + ", ".join(f"rank {rank}: {call}" for rank, call in enumerate(calls)))
