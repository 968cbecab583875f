"""Sharded models, by PyTorch's ``fully_shard``: each worker holds a part of every parameter, its gradient and what an
optimizer remembers of it, and has all of a module only for as long as it computes.

A sharded model is a module as any other: it is called, copied by ``deepcopy`` and has a state dict, though all workers
have to do so together, and its parameters are ``DTensor``. ``torch.distributed.fsdp`` is loaded with the first one.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, fields
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._jit_internal import FunctionModifiers
from torch.utils._pytree import tree_map

from raytorch.distributed.collectives import broadcast
from raytorch.distributed.shards import gathered, is_divided, own_part
from raytorch.distributed.tensor_parallel import TensorParallel, check_plan
from raytorch.errors import UserError

_MULTIPLIED = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)
"""Modules whose weights autocast casts in each call, so that they may as well be gathered in its type."""


@dataclass(frozen=True)
class Sharding:
    """How a model is divided among the workers.

    Example:
        >>> how = Sharding(((0, 1, 2, 3),), torch.device("cpu"))
        >>> shard(model, ["blocks.0", "blocks.1"], how)  # on four workers
    """

    groups: tuple[tuple[int, ...], ...]
    """Ranks of which each group has the whole model, all of one size; the first has rank 0."""
    device: torch.device
    """Where this worker computes."""
    reshard_after_forward: bool = True
    """Whether a module's parameters are let go of after the forward pass, and gathered again for the backward pass."""
    dtype: torch.dtype | None = None
    """In what weights of products are gathered, where autocast computes in it; None leaves them as they are."""
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext
    """What forward passes in that type are within, unless they are already."""
    offload: bool = False
    """Whether parameters, gradients and what optimizers remember are in the CPU's memory."""
    compile: bool = False
    """Compile the modules that are gathered one by one."""
    tensor: int = 1
    """How many workers that follow one another compute products together; such are in one group."""


class _Plan(NamedTuple):
    names: Sequence[str]
    products: Mapping[str, str]
    how: Sharding
    outline: nn.Module
    """The model without memory, and without any of this."""


_PLANS: WeakKeyDictionary[nn.Module, _Plan] = WeakKeyDictionary()
"""Those of the sharded models of this process."""


def shard(
    module: nn.Module, names: Iterable[str], how: Sharding, products: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Divide a model among all workers, in place and as rank 0 has it; they call it together.

    Modules of those ``names`` are gathered one by one, and what is left with the whole model's call. On workers other
    than rank 0 its tensors may be on the meta device; no worker has more than one of the modules whole on its device.
    ``products`` names modules that workers compute together, and how; see
    :mod:`~raytorch.distributed.tensor_parallel`.

    Raises UserError for a parameter without a dimension, and for products that cannot be divided.
    """
    check_plan(module, products, how.tensor)
    for name, parameter in module.named_parameters():
        if parameter.dim() == 0:
            raise UserError(
                f"parallel.strategy: parameter {name} is a number without a dimension, which cannot be sharded; give "
                "it the shape (1,), or take strategy: ddp"
            )
    plan = _Plan(sorted(names, key=lambda name: -name.count(".")), products, how, _outline(module))
    _divide(module, plan, lambda tensor: _from_rank_zero(tensor, how.device))


def is_sharded(module: nn.Module) -> bool:
    """Tell whether it is a model that :func:`shard` has divided."""
    return module in _PLANS


def average_over_copies(module: nn.Module, enabled: bool) -> None:
    """Set whether backward passes average the gradients of a sharded model over the groups that have all of it each,
    too, or within each group alone.
    """
    part: Any = module
    part.set_requires_all_reduce(enabled)


def reshard(module: nn.Module) -> None:
    """Let go of what a sharded model has gathered: its parameters are its parts again, which an optimizer knows."""
    if is_sharded(module):
        for part in module.modules():
            if hasattr(part, "set_requires_all_reduce"):
                part.reshard()  # type: ignore[operator]


def whole(module: nn.Module) -> nn.Module:
    """A sharded model in one piece on rank 0's CPU, and without memory on others, who call it together; any other is
    what it is.
    """
    if not is_sharded(module):
        return module
    reshard(module)
    copy, memo = deepcopy(_PLANS[module].outline), dict[int, Any]()
    for own, source in zip(copy.modules(), module.modules(), strict=True):
        own.training = source.training
        for kind in ("_parameters", "_buffers"):
            for name, tensor in vars(source)[kind].items():
                if tensor is not None and id(tensor) not in memo:
                    memo[id(tensor)] = _on_rank_zero(tensor)
                if tensor is not None and (value := memo[id(tensor)]) is not None:
                    setattr(own, name, value)
    return copy


def _on_rank_zero(tensor: Tensor) -> Tensor | None:
    value: Tensor | None = gathered(tensor.detach()) if is_divided(tensor) else tensor.detach().cpu().clone()
    if value is not None and isinstance(tensor, nn.Parameter):
        return nn.Parameter(value, tensor.requires_grad)
    return value


def outline(module: nn.Module) -> nn.Module:
    """A copy of a model without memory, in one piece if it is sharded."""
    return deepcopy(_PLANS[module].outline) if is_sharded(module) else _outline(module)


def _outline(module: nn.Module) -> nn.Module:
    """A copy without memory."""
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        empty = torch.empty_like(tensor, device="meta", requires_grad=False)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    return deepcopy(module, memo)


def _from_rank_zero(tensor: Tensor, device: torch.device) -> Tensor:
    if dist.get_rank() == 0:
        there = tensor.detach().to(device).contiguous()
    else:
        there = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    return broadcast(there)


class _Places:
    """Where each tensor of a model is, under how many names ever, so that another can take its place."""

    def __init__(self, module: nn.Module) -> None:
        self._places: dict[int, list[tuple[nn.Module, str]]] = {}
        for owner in module.modules():
            for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
                if tensor is not None:
                    self._places.setdefault(id(tensor), []).append((owner, name))
        self.multiplied: set[int] = set()
        """Parameters that have been put there and are weights of products alone, by their id."""

    def __contains__(self, tensor: Tensor) -> bool:
        """Tell whether it has been put there by nobody yet."""
        return id(tensor) in self._places

    def fill(self, tensor: Tensor, value: Tensor) -> None:
        """Put ``value`` where ``tensor`` is."""
        places = self._places.pop(id(tensor))
        if isinstance(tensor, nn.Parameter):
            value = nn.Parameter(value, tensor.requires_grad)
            if tensor.dim() > 1 and all(isinstance(owner, _MULTIPLIED) for owner, _ in places):
                self.multiplied.add(id(value))
        for owner, name in places:
            setattr(owner, name, value)


def _divide(module: nn.Module, plan: _Plan, filled: Callable[[Tensor], Tensor]) -> None:
    """Divide module after module, each of tensors that are ``filled`` when it is its turn."""
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    how, places = plan.how, _Places(module)
    offload = CPUOffloadPolicy(pin_memory=how.device.type == "cuda") if how.offload else OffloadPolicy()
    mesh = _mesh(dist.group.WORLD, how.groups, how.tensor, how.device.type)
    computed = TensorParallel(module, plan.products, mesh["tensor"]) if how.tensor > 1 else None
    for buffer in list(module.buffers()):
        places.fill(buffer, filled(buffer))
    for name in (*plan.names, ""):
        part = module.get_submodule(name)
        for parameter in [each for each in part.parameters() if each in places]:
            value = filled(parameter)
            places.fill(parameter, computed.divided(parameter, value) if computed else value)
        if how.compile and name:
            part.compile(dynamic=False)
        fully_shard(
            part,
            mesh=mesh[tuple(name for name in mesh.mesh_dim_names if name != "tensor")] if computed else mesh,
            # The whole model too: what stays from a call without a backward pass would be old after the next step.
            reshard_after_forward=how.reshard_after_forward,
            mp_policy=_precision(how.dtype, places.multiplied),
            offload_policy=offload,
        )
        places.multiplied = set()  # of parameters that are no more
    _PLANS[module] = plan
    vars(module)["__deepcopy__"] = lambda memo: _copied(module)  # fully_shard's own refuses
    _compute_within_autocast(module, how)


@lru_cache(maxsize=4)
def _mesh(world: Any, groups: tuple[tuple[int, ...], ...], tensor: int, device_type: str) -> Any:
    """The workers of the group ``world`` as a mesh: of its groups, the parts of a group, and of products."""
    from torch.distributed.device_mesh import DeviceMesh

    ranks = torch.tensor(groups).view(len(groups), -1, tensor)
    sizes = {"copy": len(groups), "shard": 0, "tensor": tensor}
    names = tuple(name for name, size in sizes.items() if size != 1)
    shape = [size for name, size in zip(sizes, ranks.shape, strict=True) if name in names]
    return DeviceMesh(device_type, ranks.view(shape), mesh_dim_names=names)


def _precision(dtype: torch.dtype | None, multiplied: set[int]) -> Any:
    """Gradients are added up in float32, and the weights that autocast would cast are gathered in its type.

    The numbers are those of autocast, which would hold on to what it has cast until the backward pass.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if dtype is None or "param_dtype_override_fn" not in {field.name for field in fields(MixedPrecisionPolicy)}:
        return MixedPrecisionPolicy()  # before torch 2.15 autocast casts what is gathered
    return MixedPrecisionPolicy(
        param_dtype=dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
        param_dtype_override_fn=lambda each: None if id(each) in multiplied else each.dtype,
    )


def _compute_within_autocast(module: nn.Module, how: Sharding) -> None:
    """Let calls of the model, and of what TorchScript exports of it, be within autocast, and have its parameters."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    vars(module)["forward"] = _within_autocast(module.forward, how)
    for name in dir(type(module)):
        if getattr(getattr(type(module), name), "_torchscript_modifier", None) is FunctionModifiers.EXPORT:
            vars(module)[name] = _within_autocast(getattr(module, name), how)
            register_fsdp_forward_method(module, name)


def _within_autocast(call: Callable[..., Any], how: Sharding) -> Callable[..., Any]:
    """``call`` in the type in which weights are gathered; what comes out where nobody has asked for it is float32."""

    def method(*args: Any, **kwargs: Any) -> Any:
        if how.dtype is None or torch.is_autocast_enabled(how.device.type):
            return call(*args, **kwargs)
        with how.autocast():
            result = call(*args, **kwargs)
        return tree_map(lambda it: it.float() if isinstance(it, Tensor) and it.dtype == how.dtype else it, result)

    return method


@torch.no_grad()
def _copied(module: nn.Module) -> nn.Module:
    """A copy that is divided alike."""
    plan = _PLANS[module]
    copy = deepcopy(plan.outline)
    _divide(copy, plan, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=plan.how.device))
    reshard(module)
    for own, source in zip(copy.modules(), module.modules(), strict=True):
        own.training = source.training
    for kind in ("parameters", "buffers"):
        for into, source in zip(getattr(copy, kind)(), getattr(module, kind)(), strict=True):
            into.requires_grad_(source.requires_grad)
            own_part(into).copy_(own_part(source))
    return copy
