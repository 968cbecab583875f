"""Tensors of which every worker holds a part, ``DTensor`` of PyTorch, and whole ones: from the one to the other.

They are divided along their first dimension, as ``fully_shard`` does it, over the last dimension of their mesh. All of
it is for tensors that are not divided as well, which stay as they are. Nothing here loads ``torch.distributed.tensor``.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


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


@torch.no_grad()
def divided_like(like: Tensor, whole: Any) -> Any:
    """``whole`` as ``like`` is: divided, of which this worker holds its part alone, if it is a tensor of its shape.

    No other worker is asked; each is to be given the same.

    Example:
        >>> divided_like(torch.zeros(2), torch.ones(2))  # not divided
        tensor([1., 1.])
    """
    if not is_divided(like) or not isinstance(whole, Tensor) or whole.shape != like.shape or is_divided(whole):
        return whole
    divided = torch.empty_like(like, dtype=whole.dtype, requires_grad=False)
    own = own_part(divided)
    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    rows = _rows_of_each(whole, mesh.size(mesh.ndim - 1))
    begin = min(rows * mesh.get_local_rank(mesh.ndim - 1), len(whole))
    own.copy_(whole[begin : begin + len(own)])
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
    own = own_parts(each.grad for each in parameters if each.grad is not None)
    divided: Any = next(filter(is_divided, parameters), None)
    if divided is None:
        nn.utils.clip_grad_norm_(parameters, most)
    elif own:
        mesh = divided.device_mesh
        square = torch.stack(torch._foreach_norm(own)).square().sum().to(mesh.device_type)
        dist.all_reduce(square, group=mesh.get_group(mesh.ndim - 1))
        factor = (most / (square.sqrt() + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(own, factor.to(own[0].device))


def _rows_of_each(whole: Tensor, workers: int) -> int:
    """Rows of the part of each worker, of which the last ones may have fewer or none."""
    return -(-len(whole) // workers)


def _gathered(tensor: Tensor) -> Tensor | None:
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    *copy, place = mesh.get_coordinate()
    if any(copy):  # rank 0 is in the first of the groups that have one each
        return None
    group, rows = mesh.get_group(mesh.ndim - 1), _rows_of_each(tensor, mesh.size(mesh.ndim - 1))
    own = own_part(tensor)
    sent = torch.zeros((rows, *tensor.shape[1:]), dtype=tensor.dtype, device=mesh.device_type)
    sent[: len(own)].copy_(own)
    flat = sent.view(-1)
    if place:
        dist.gather(flat, None, group=group, group_dst=0)
        return None
    parts = [torch.empty_like(flat) for _ in range(group.size())]
    dist.gather(flat, parts, group=group, group_dst=0)
    whole = torch.cat([part.cpu() for part in parts]).view(-1, *tensor.shape[1:]) if tensor.numel() else sent.cpu()
    return whole[: len(tensor)]
