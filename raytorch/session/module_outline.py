"""Outline of a module: what it would be made of, found out without the memory that it would take."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from raytorch.errors import SessionError

MOST_PLACES = 250_000
"""Modules in modules of all objects together at most, those that are shared counted in each of their places."""
MOST_LEVELS = 100
"""Modules inside each other at most."""
_MOST_CALLS = 3_000_000
_CLONING = (nn.TransformerEncoder, nn.TransformerDecoder)
"""Classes that copy the module that is their first argument as often as their second one says."""


class Bounds:
    """Limits of making a module: tensors and bytes on the way to it, and modules in it."""

    def __init__(self, *, tensors: int, nbytes: int, modules: int) -> None:
        # Initialization takes some calls for each tensor; positional codes are computed in several steps.
        self.calls = 2_000 + min(100 * tensors, _MOST_CALLS)
        self.nbytes = 64 * 2**20 + 16 * nbytes
        self.modules = modules


def outline(
    maker: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], bounds: Bounds | None = None
) -> nn.Module:
    """Make what ``maker`` makes of the arguments, with tensors that have shapes alone; the arguments stay as they are.

    Raises SessionError: it would take more than the bounds.
    """
    if bounds and maker in _CLONING:
        layer, count, *_ = inspect.signature(maker).bind(*args, **kwargs).args
        if not isinstance(layer, nn.Module) or count * len(list(layer.modules())) > bounds.modules:
            raise SessionError(f"{count} layers are more than the {bounds.modules} modules that it lists")
    with _WithoutMemory(bounds):
        made: nn.Module = maker(*args, **kwargs)
    return made


class WithinBounds(TorchDispatchMode):
    """Counts what everything in its block takes, but for tensors that have shapes alone."""

    def __init__(self, bounds: Bounds | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._bounds = bounds
        self._calls = self._nbytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self._count(0, sum(part.nbytes for part in _made(function, result) if not part.is_meta))
        return result

    def _count(self, calls: int, nbytes: int) -> None:
        self._calls += calls
        self._nbytes += nbytes
        if self._bounds and (self._calls > self._bounds.calls or self._nbytes > self._bounds.nbytes):
            raise SessionError("it would take far more memory than its file has tensors for")


class _WithoutMemory(WithinBounds):  # type: ignore[no-untyped-call]
    """Computes everything on the meta device, whatever device is asked for, and counts what it would take."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Tensor, _on_meta, (args, kwargs or {}))
        if any(argument.name == "device" for argument in function._schema.arguments):
            kwargs["device"] = torch.device("meta")
        result = function(*args, **kwargs)
        self._count(1, sum(part.nbytes for part in _made(function, result)))
        return result


def _made(function: Any, result: Any) -> list[Tensor]:
    """The tensors of a call's result that have memory of their own."""
    if any(argument.alias_info for argument in function._schema.arguments):
        return []
    return [part for part in tree_leaves(result) if isinstance(part, Tensor)]


def _on_meta(tensor: Tensor) -> Tensor:
    if tensor.device.type == "meta":
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def tensors_in(made: Any) -> dict[str, Tensor]:
    """A module's parameters and buffers by their dotted names; nothing of what is no module."""
    return dict([*made.named_parameters(), *made.named_buffers()]) if isinstance(made, nn.Module) else {}


def extent(module: nn.Module, known: dict[nn.Module, tuple[int, int]] | None = None) -> tuple[int, int]:
    """In how many places of a module there are modules, shared ones counted in each of theirs, and how deep it is."""
    known = {} if known is None else known
    if module not in known:
        inner = [extent(child, known) for child in module.children()]
        known[module] = 1 + sum(places for places, _ in inner), 1 + max((depth for _, depth in inner), default=0)
    return known[module]
