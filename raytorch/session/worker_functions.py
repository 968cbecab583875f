"""Functions that sessions call on the workers beside PyTorch's own."""

import functools
import shutil
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from types import FunctionType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from raytorch.errors import SessionError
from raytorch.session import restore as restoring
from raytorch.session import save as snapshot
from raytorch.session.registry import HandleKind, Recipe, Registry, kind_of
from raytorch.session.result_structure import describe, rebuilt
from raytorch.session.saved_names import STATEFUL
from raytorch.session.tensor_transfer import Payload


class WorkerContext(Protocol):
    """Where a function runs."""

    registry: Registry
    rank: int
    device: torch.device


def create(context: WorkerContext, factory: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Make what ``factory`` makes: a module, an optimizer, any object."""
    recipe = Recipe(factory, args, kwargs)
    made = recipe.make(context.device)
    if isinstance(made, STATEFUL):
        context.registry.recipes[made] = recipe
    return made


def call(held: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call an object that lives on the worker: a module, say."""
    return held(*args, **kwargs)


def method(held: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """Call a method of an object that lives on the worker; ``name`` may be dotted."""
    return attribute(held, name)(*args, **kwargs)


def apply(function: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
    """Apply a function with a backward pass of its own, in a graph that this differentiates."""
    return function.apply(*args, **kwargs)


def attribute(held: Any, name: str) -> Any:
    """Read an attribute; ``name`` may be dotted."""
    return functools.reduce(getattr, name.split("."), held)


def set_attribute(held: Any, name: str, value: Any) -> None:
    setattr(held, name, value)


def unpack(result: Any) -> list[Any]:
    """The values that a result holds, which could not leave the worker, in the order of its description."""
    held: list[Any] = []
    describe(result, held)
    return held


def fetch(tensor: Tensor) -> Payload:
    return Payload.of(tensor)


def state_of(held: Any) -> Any:
    """The state dict of a module or an optimizer, for the client."""
    return rebuilt(held.state_dict(), Tensor, Payload.of)


def load_state(held: Any, state: Any, *options: Any) -> None:
    held.load_state_dict(state, *options)


def named_parameters(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters by their dotted names."""
    return dict(module.named_parameters())


def set_gradient_sync(module: nn.Module, enabled: bool) -> None:
    """Set whether DistributedDataParallel averages gradients; see its ``no_sync``."""
    if isinstance(module, DistributedDataParallel):
        module.require_backward_grad_sync = enabled


def learning_rate(optimizer: Optimizer) -> float:
    return float(optimizer.param_groups[0]["lr"])


def set_learning_rate(optimizer: Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


def upload(context: WorkerContext, payload: Payload) -> Tensor:
    """A tensor of the client's content, on the worker's device."""
    tensor = payload.adopted() if payload.is_private else payload.resizable()
    if context.device.type == "cpu":
        return tensor
    return tensor.detach().to(context.device).requires_grad_(tensor.requires_grad)


def stats(context: WorkerContext) -> dict[str, Any]:
    return context.registry.stats()


def listing(context: WorkerContext) -> list[dict[str, Any]]:
    """Every handle, in order, with what it names."""
    return [{"handle": handle, **_described(value)} for handle, value in sorted(context.registry, key=itemgetter(0))]


def kind_of_handle(context: WorkerContext, handle: int) -> str | None:
    """The kind of what a handle names; None if it names nothing."""
    return kind_of(context.registry.get(handle)) if handle in context.registry else None


def lookup(context: WorkerContext, handle: int) -> Any:
    return context.registry.get(handle)


def save(context: WorkerContext, folder: str, final: str) -> list[int]:
    """Write what this rank holds into its part of a folder, if nothing has the name that this will have in the end."""
    if Path(final).exists():
        raise SessionError(f"{final} exists already; choose a new folder")
    return snapshot.save(context.registry, _part(context, folder), context.device)


def finish_save(folder: str, final: str) -> None:
    """Give a folder that all ranks have written its name."""
    Path(folder).rename(final)


def discard_save(folder: str) -> None:
    """Remove a folder that not all ranks could write."""
    shutil.rmtree(folder, ignore_errors=True)


def look_at_saved(context: WorkerContext, folder: str, workers: int, trust: bool) -> tuple[list[int], int]:
    """Inspect what :func:`save` wrote, with as many workers; see :func:`raytorch.session.restore.look`."""
    parts = len(list(Path(folder).glob("rank-*")))
    if parts and parts != workers:
        raise SessionError(f"{folder} was saved by {parts} workers: connect with workers={parts}, not {workers}")
    return restoring.look(_part(context, folder), trust=trust)


def restore(context: WorkerContext, folder: str, trust: bool) -> list[int]:
    """Read what :func:`save` wrote; see :func:`raytorch.session.restore.restore`."""
    return restoring.restore(context.registry, _part(context, folder), context.device, trust=trust)


def _part(context: WorkerContext, folder: str) -> Path:
    return Path(folder) / f"rank-{context.rank}"


def _described(value: Any) -> dict[str, Any]:
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        shape = None if is_lazy(value) else tuple(value.shape)
        return {"kind": str(HandleKind.TENSOR), "type": dtype, "shape": shape, "device": str(value.device)}
    return {"kind": str(kind_of(value)), "type": type(value).__name__}


PRIMITIVES: dict[str, Callable[..., Any]] = {
    f"raytorch.session.{name}": function
    for name, function in globals().items()
    if isinstance(function, FunctionType) and function.__module__ == __name__ and not name.startswith("_")
}
"""All of them, by the names in their instructions."""
ON_WORKER = {name for name, function in PRIMITIVES.items() if WorkerContext in function.__annotations__.values()}
"""Those that take the worker's registry and device as their first argument."""
