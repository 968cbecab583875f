"""Activation checkpointing: modules that are computed again in the backward pass, and keep nothing until then."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from raytorch.errors import ConfigError
from raytorch.training.flops import not_counted
from raytorch.training.module_names import derive, matching


def recompute(model: nn.Module, patterns: Sequence[str]) -> None:
    """Let the modules that ``patterns`` name keep no more for the backward pass than what they are given.

    Of modules inside each other the outermost does it. Raises ConfigError for a pattern that names nothing.
    """
    modules = {name: module for name, module in model.named_modules() if name and _is_called(module)}
    lists = [f"{name}.*" for name, module in model.named_modules() if name and not _is_called(module)]
    done: list[str] = []
    for name in matching("model.checkpointing", patterns, "module", modules, lists):
        if not any(name.startswith(f"{outer}.") for outer in done):
            derive(modules[name], forward=partial(_forward_twice, name))
            done.append(name)


def _is_called(module: nn.Module) -> bool:
    """Tell whether a call of the module is one of its class's ``forward``, which a list of modules has not."""
    kind: Any = type(module)
    return kind.forward is not nn.Module.forward and "forward" not in vars(module)


def _forward_twice(name: str, forward: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A call of ``forward``, and another in the backward pass, which has the buffers as this one has found them."""
    if not torch.is_grad_enabled():
        return forward(module, *args, **kwargs)
    buffers = _Buffers(module)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return buffers.watched(), _again(buffers)

    given = [(value, value._version) for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    result = checkpoint(forward, module, *args, use_reentrant=False, context_fn=contexts, **kwargs)
    if any(value._version != version for value, version in given):
        raise ConfigError(
            f"model.checkpointing: {name} changes what it is given in place, so that it cannot be computed again; name "
            "the module around it, or let it make a new tensor (inplace=False)"
        )
    return result


@contextmanager
def _again(buffers: "_Buffers") -> Iterator[None]:
    with not_counted(), buffers.as_found():
        yield


class _Buffers:
    """The buffers that a module changes when it is called, as running statistics are, from before the call."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._found: list[tuple[nn.Module, str, Tensor]] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Keep what the block changes."""
        before = [
            (owner, name, buffer, buffer.clone(), buffer._version)
            for owner in self._module.modules()
            for name, buffer in owner.named_buffers(recurse=False)
        ]
        yield
        self._found = [
            (owner, name, content)
            for owner, name, buffer, content, version in before
            # PyTorch's normalizations change theirs without telling.
            if isinstance(owner, _NormBase) or owner._buffers.get(name) is not buffer or buffer._version != version
        ]

    @contextmanager
    def as_found(self) -> Iterator[None]:
        """Let the block have them as they were, and what it makes of them be forgotten."""
        present = [(owner, name, owner._buffers.get(name)) for owner, name, _ in self._found]
        for owner, name, content in self._found:
            owner._buffers[name] = content.clone()
        try:
            yield
        finally:
            for owner, name, buffer in present:
                owner._buffers[name] = buffer
