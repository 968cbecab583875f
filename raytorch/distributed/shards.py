"""Tensors of which every worker holds a part, ``DTensor`` of PyTorch, and whole ones: from the one to the other.

A part is a box of the whole: what the last dimension of the mesh leaves of it, if that divides it, of which the one
before it leaves a part in turn, as ``fully_shard`` does it with what tensor parallelism has divided. All of it is for
tensors that are not divided as well, which stay as they are. Nothing here loads ``torch.distributed.tensor``.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn


@runtime_checkable
class Stored(Protocol):
    """A whole tensor that is not in memory, of which a part can be read."""

    shape: torch.Size
    dtype: torch.dtype

    def read(self, offsets: Sequence[int] | None = None, sizes: Sequence[int] | None = None) -> Tensor:
        """The part of ``sizes`` that begins at ``offsets``, or all of it, on the CPU."""


def is_divided(value: Any) -> bool:
    """Tell whether it is a tensor of which this worker holds a part."""
    return isinstance(value, Tensor) and hasattr(value, "device_mesh")


def own_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this worker holds, in the same memory."""
    with torch.no_grad():
        own: Tensor = tensor.to_local() if is_divided(tensor) else tensor  # type: ignore[attr-defined]
    return own


def own_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The parts of some tensors that this worker holds, in the same memory."""
    return [own_part(tensor) for tensor in tensors]


def place_of(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape of the whole of which ``own_part(tensor)`` is a part, and where that part begins in each dimension.

    Example:
        >>> place_of(torch.zeros(2, 3))  # not divided
        ((2, 3), (0, 0))
    """
    return tuple(tensor.shape), tuple(low for low, _ in _box(tensor))


def is_written_here(tensor: Tensor) -> bool:
    """Tell whether this worker is the one of those with the same part that writes it; of what is not divided, rank 0.

    Example:
        >>> is_written_here(torch.zeros(2))  # of a group of one
        True
    """
    if not is_divided(tensor):
        return not dist.is_initialized() or dist.get_rank() == 0
    dividing = {each.mesh_dim for each in _divisions(tensor)}
    return not any(place for dim, place in enumerate(_coordinate(tensor)) if dim not in dividing)


@torch.no_grad()
def divided_like(like: Tensor, whole: Any) -> Any:
    """``whole`` as ``like`` is: divided, of which this worker holds its part alone, if it is a tensor of its shape.

    No other worker is asked; each is to be given the same. Of what is :class:`Stored` no more is read than is needed.

    Example:
        >>> divided_like(torch.zeros(2), torch.ones(2))  # not divided
        tensor([1., 1.])
    """
    is_stored = isinstance(whole, Stored) and not isinstance(whole, Tensor)
    if not is_divided(like) or not (is_stored or isinstance(whole, Tensor)) or whole.shape != like.shape:
        return whole.read() if is_stored else whole
    if is_divided(whole):
        return whole
    divided = torch.empty_like(like, dtype=whole.dtype, requires_grad=False)
    if (own := own_part(divided)).numel():  # fully_shard has other shapes for what is empty
        box = _box(like)
        if is_stored:
            own.copy_(whole.read([low for low, _ in box], [high - low for low, high in box]))
        else:
            own.copy_(whole[tuple(slice(low, high) for low, high in box)])
    return divided


def state_like(module: nn.Module, whole: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of whole tensors as ``module`` can load it, with this worker's parts where it is divided."""
    own = module.state_dict()
    return {name: divided_like(own[name], value) if name in own else value for name, value in whole.items()}


def remembered_like(parameters: Iterable[Tensor], whole: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What an optimizer remembers of each parameter, of whole tensors, as it can load it: divided as they are.

    Of another number of parameters it stays what it is.
    """
    parameters, remembered = list(parameters), [dict(each) for each in whole]
    if len(parameters) != len(remembered):
        return remembered
    return [
        {name: divided_like(parameter, value) for name, value in there.items()}
        for parameter, there in zip(parameters, remembered, strict=True)
    ]


def gathered(value: Any) -> Any:
    """Nested state with whole tensors on the CPU in place of divided ones, on rank 0; None on others.

    All workers call it together, with their parts of the same. One tensor at a time is whole on the device.
    """
    if is_divided(value):
        return _gathered(value)
    if isinstance(value, Mapping):
        return {key: gathered(part) for key, part in value.items()}
    return type(value)(map(gathered, value)) if type(value) in (list, tuple) else value


def clip_gradients(parameters: Iterable[nn.Parameter], most: float) -> None:
    """Scale gradients down to a norm of ``most`` over all of them, on whichever workers; all call it together.

    See ``torch.nn.utils.clip_grad_norm_``.
    """
    parameters = list(parameters)
    gradients = [each.grad for each in parameters if each.grad is not None]
    divided: Any = next(filter(is_divided, parameters), None)
    if divided is None:
        nn.utils.clip_grad_norm_(parameters, most)
    elif gradients:
        mesh, own = divided.device_mesh, own_parts(gradients)
        factor = (most / (_norm(gradients, mesh) + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(own, factor.to(own[0].device))


def _norm(tensors: list[Tensor], mesh: Any) -> Tensor:
    """The norm of all of some tensors that are divided over ``mesh``, each part counted once."""
    dividing = [{each.mesh_dim for each in _divisions(tensor)} for tensor in tensors]
    summed = sorted(set().union(*dividing))
    coordinate = mesh.get_coordinate()
    counted = [not any(coordinate[dim] for dim in summed if dim not in dims) for dims in dividing]
    squares = torch.stack(torch._foreach_norm(own_parts(tensors))).square().to(mesh.device_type)
    total = (squares * torch.tensor(counted, device=squares.device)).sum()
    for dim in summed:
        dist.all_reduce(total, group=mesh.get_group(dim))
    return total.sqrt()


class _Division(NamedTuple):
    """That a dimension of a tensor is divided over one of its mesh; the last parts may be smaller, or empty."""

    mesh_dim: int
    dim: int


def _divisions(tensor: Tensor) -> list[_Division]:
    """How a tensor is divided, the first division of the whole first."""
    placements: Any = getattr(tensor, "placements", ())
    return [_Division(at, each.dim) for at, each in reversed([*enumerate(placements)]) if hasattr(each, "dim")]


def _coordinate(tensor: Tensor) -> list[int]:
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    return list(mesh.get_coordinate())


def _boxes(tensor: Tensor) -> list[list[tuple[int, int]]]:
    """Where this worker's part begins and ends in each dimension, after each of the divisions; the whole first."""
    boxes = [[(0, size) for size in tensor.shape]]
    for mesh_dim, dim in _divisions(tensor):
        mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
        low, high = boxes[-1][dim]
        size = -(-(high - low) // mesh.size(mesh_dim))
        begin = min(low + size * mesh.get_local_rank(mesh_dim), high)
        boxes.append([*boxes[-1][:dim], (begin, min(begin + size, high)), *boxes[-1][dim + 1 :]])
    return boxes


def _box(tensor: Tensor) -> list[tuple[int, int]]:
    return _boxes(tensor)[-1]


def _gathered(tensor: Tensor) -> Tensor | None:
    """The whole on rank 0, which is the first of each dimension of the mesh."""
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    if not is_written_here(tensor):
        return None
    *boxes, last = _boxes(tensor)
    own = own_part(tensor).reshape([high - low for low, high in last])
    for (mesh_dim, dim), box in reversed([*zip(_divisions(tensor), boxes, strict=True)]):
        low, high = box[dim]
        joined = _joined(own, dim, high - low, mesh.get_group(mesh_dim), mesh.device_type)
        if joined is None:
            return None
        own = joined
    return own.cpu()


def _joined(own: Tensor, dim: int, size: int, group: Any, device_type: str) -> Tensor | None:
    """The parts of a group, of ``size`` together in a dimension, on the CPU of its first; None on others."""
    rows = -(-size // group.size())
    first = own.movedim(dim, 0)
    sent = torch.zeros((rows, *first.shape[1:]), dtype=own.dtype, device=device_type)
    sent[: len(first)].copy_(first)
    flat = sent.view(-1)
    if group.rank():
        dist.gather(flat, None, group=group, group_dst=0)
        return None
    parts = [torch.empty_like(flat) for _ in range(group.size())]
    dist.gather(flat, parts, group=group, group_dst=0)
    whole = torch.cat([part.cpu() for part in parts]).view(rows * len(parts), *first.shape[1:])
    return whole[:size].movedim(0, dim).contiguous()
