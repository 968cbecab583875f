"""Products that a group of workers computes together: each has some of the rows or columns of their matrices.

A module of a divided model computes with this worker's parts, by plain code: its parameters are ``DTensor`` where they
are kept, and what its attributes give are the parts. All that is not divided each worker of a group has, and computes
alike. The model says what is divided by a plan: names of modules, each with one of :data:`KINDS`.

``torch.distributed.tensor`` is loaded with the first such model.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from raytorch.distributed.collectives import all_reduce
from raytorch.distributed.shards import own_part
from raytorch.errors import UserError

KINDS = {
    "column": "an nn.Linear of which each worker computes some of the outputs",
    "row": "an nn.Linear that each worker gives some of the inputs, and whose outputs are added up; or an nn.Embedding "
    "of which each has some of the vectors",
    "gathered": "an nn.Linear as column, whose outputs are put together on each worker; or a module with out_features, "
    "which is called with the matrix of an nn.Embedding that is a row",
    "region": "a module that is given the same on all workers, and whose parts compute with some of it each, up to a "
    "row",
}
"""What a plan says of a module."""
_WHOLE_ALONE = ("padding_idx", "max_norm", "scale_grad_by_freq", "sparse")
"""Attributes of an nn.Embedding that have to be unset for some of its vectors to do as all would."""


_UNEQUAL = 0.01
"""Share of a gradient by which another is no longer the same up to the order of sums."""


def check_plan(module: nn.Module, plan: Mapping[str, str], workers: int) -> None:
    """Raise UserError for what of a model cannot be divided among so many workers as ``plan`` says, by exact names.

    Example:
        >>> check_plan(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)), {"0": "column", "2": "row"}, 2)
    """
    for name, kind in plan.items():
        part = module.get_submodule(name)
        if kind not in KINDS:
            raise UserError(f"tensor_plan: {name}: {kind!r:.80} is none of {', '.join(KINDS)}")
        is_own = kind == "region" or (kind == "gathered" and not part._parameters and hasattr(part, "out_features"))
        if not (is_own or isinstance(part, nn.Linear) or (kind == "row" and isinstance(part, nn.Embedding))):
            raise UserError(f"tensor_plan: {name} is a {type(part).__name__}; {kind} is for {KINDS[kind]}")
        if isinstance(part, nn.Embedding):
            odd = [
                each for each in _WHOLE_ALONE if getattr(part, each) is not None and getattr(part, each) is not False
            ]
            if odd:
                raise UserError(f"tensor_plan: {name} has {', '.join(odd)}, and cannot be divided so; leave it out")
        size = {"column": "out_features", "row": "in_features"}.get(kind)
        if isinstance(part, nn.Linear) and size and getattr(part, size) % workers:
            raise UserError(
                f"parallel.tensor: {workers} workers do not divide the {size} of {name}, {getattr(part, size)}; take "
                "another number, or other sizes of the model"
            )


@torch.no_grad()
def unequal_gradients(module: nn.Module) -> list[str]:
    """Names of parameters that each worker of a group has all of, and whose gradients are others on some of them.

    Their weights would part. All workers call it together and are told the same.
    """
    found: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        mesh: Any = getattr(parameter, "device_mesh", None)
        if mesh is None or "tensor" not in mesh.mesh_dim_names or parameter.grad is None:
            continue
        at = mesh.mesh_dim_names.index("tensor")
        if hasattr(parameter.placements[at], "dim"):  # type: ignore[attr-defined]
            continue
        group, own = mesh.get_group("tensor"), own_part(parameter.grad).to(mesh.device_type).contiguous()
        first = own.clone()
        dist.broadcast(first, group=group, group_src=0)
        found[name] = (own - first).norm() > _UNEQUAL * first.norm()
    if not found:
        return []
    are_unequal = all_reduce(torch.stack([*found.values()]).float(), "max").tolist()
    return [name for name, is_unequal in zip(found, are_unequal, strict=True) if is_unequal]


class TensorParallel:
    """Divides the parameters of a model over the workers of a mesh of one dimension, and lets its modules compute so.

    Args:
        module: The model.
        plan: Names of modules, each with one of KINDS.
        mesh: The workers.

    Example:
        >>> computed = TensorParallel(model, {"up": "column", "down": "row"}, mesh["tensor"])
        >>> weight = computed.divided(model.up.weight, whole)  # a DTensor, to be put in the parameter's place
    """

    def __init__(self, module: nn.Module, plan: Mapping[str, str], mesh: Any) -> None:
        self._mesh = mesh
        self._dims: dict[int, int] = {}
        for name, kind in plan.items():
            part = module.get_submodule(name)
            for key, parameter in part._parameters.items():
                if parameter is not None and (dim := _divided_dim(part, kind, key)) is not None:
                    self._dims[id(parameter)] = dim
        regions = [name for name, kind in plan.items() if kind == "region"]
        for name, part in module.named_modules():
            is_inside = any(name == region or name.startswith(f"{region}.") for region in regions)
            keys = tuple(key for key, parameter in part._parameters.items() if parameter is not None)
            kind = plan.get(name, "")
            if keys or kind:
                own: Any = type(part)
                part.__class__ = _derived(own, kind, keys, mesh, is_inside, dist.group.WORLD)

    def divided(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        """``whole`` in the place of ``parameter``, as this worker is to have it."""
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        dim = self._dims.get(id(parameter))
        return distribute_tensor(whole, self._mesh, [Replicate() if dim is None else Shard(dim)], src_data_rank=None)


def _divided_dim(part: nn.Module, kind: str, key: str) -> int | None:
    """The dimension along which a parameter is divided; None if each worker has all of it."""
    if kind == "region":
        return None
    if kind != "row" or isinstance(part, nn.Embedding):
        return 0
    return 1 if key == "weight" else None  # the bias is added to the sum


@lru_cache(maxsize=256)
def _derived(own: Any, kind: str, keys: tuple[str, ...], mesh: Any, is_inside: bool, world: Any) -> type[nn.Module]:
    """A class derived from a module's, and the same for all that are alike, so that they are compiled once.

    Meshes of the same ranks are equal, and so ``world`` says of which group these are.
    """
    names: dict[str, Any] = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    for key in keys:
        is_partial = is_inside and not (kind == "row" and key == "bias")
        names[key] = _part(key, is_partial)
    if kind:
        names["forward"] = _FORWARDS[kind](own, mesh, is_inside)
    return type(own.__name__, (own,), names)


def _part(key: str, is_partial: bool) -> property:
    """What the group has of a parameter while the module computes is this worker's part of it, for its code.

    Gradients of what all have are added up if they are of parts.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    def part(module: nn.Module) -> Any:
        parameter: Any = module._parameters[key]
        if not isinstance(parameter, DTensor) or parameter.device_mesh.ndim > 1:  # as it is kept
            return parameter
        places = [Partial() if is_partial and isinstance(each, Replicate) else each for each in parameter.placements]
        return parameter.to_local(grad_placements=places)

    return property(part)


def _alike(x: Tensor, mesh: Any) -> Tensor:
    """``x`` itself, which all workers have, whose gradient is the sum of those of their parts."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    part: Tensor = DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])
    return part


class _Summed(torch.autograd.Function):
    """The sum of what the workers have, which all of them then have: no view, which must not be changed in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Any) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=mesh.get_group())
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Joined(torch.autograd.Function):
    """The last dimension in one piece, of which each worker has a part; no view either."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, mesh: Any) -> Tensor:
        most = -(-size // mesh.size())
        ctx.begin, ctx.own = min(most * mesh.get_local_rank(), size), x.shape[-1]
        every = x.new_empty((mesh.size(), *x.shape[:-1], most))
        own = F.pad(x, (0, most - ctx.own)).contiguous()
        dist.all_gather_into_tensor(every.view(-1), own.view(-1), group=mesh.get_group())
        ends = [min(most * (place + 1), size) - min(most * place, size) for place in range(mesh.size())]
        return torch.cat([part[..., :end] for part, end in zip(every, ends, strict=True)], dim=-1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.narrow(-1, ctx.begin, ctx.own), None, None


def _column(own: Any, mesh: Any, is_inside: bool) -> Callable[..., Tensor]:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        outputs: Tensor = own.forward(self, x if is_inside else _alike(x, mesh))
        return outputs

    return forward


def _row(own: Any, mesh: Any, is_inside: bool) -> Callable[..., Tensor]:
    if issubclass(own, nn.Embedding):
        return _embedding(mesh)

    def forward(self: Any, x: Tensor) -> Tensor:
        outputs: Tensor = _Summed.apply(F.linear(x, self.weight), mesh)
        return outputs if self.bias is None else outputs + self.bias

    return forward


def _embedding(mesh: Any) -> Callable[..., Tensor]:
    def forward(self: Any, places: Tensor) -> Tensor:
        weight = self.weight
        begin = min(-(-self.num_embeddings // mesh.size()) * mesh.get_local_rank(), self.num_embeddings)
        is_here = (places >= begin) & (places < begin + len(weight))
        if not len(weight):
            weight = F.pad(weight, (0, 0, 0, 1))
        found = F.embedding(torch.where(is_here, places - begin, 0), weight)
        vectors: Tensor = _Summed.apply(found * is_here.unsqueeze(-1), mesh)
        return vectors

    return forward


def _gathered(own: Any, mesh: Any, is_inside: bool) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor, *matrix: Tensor) -> Tensor:
        part: Tensor = own.forward(self, x if is_inside else _alike(x, mesh), *matrix)
        joined: Tensor = _Joined.apply(part, self.out_features, mesh)
        return joined

    return forward


def _region(own: Any, mesh: Any, is_inside: bool) -> Callable[..., Any]:
    def forward(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return own.forward(self, _alike(x, mesh), *args, **kwargs)

    return forward


_FORWARDS: dict[str, Callable[[Any, Any, bool], Callable[..., Any]]] = {
    "column": _column,
    "row": _row,
    "gathered": _gathered,
    "region": _region,
}
