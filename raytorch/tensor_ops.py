"""Tensor operations by the names that sessions use: PyTorch's own functions, but for ``index``.

A function of raytorch's own that is :func:`overridable` serves tensors and a session's handles alike. A class that
defines ``__torch_function__`` is handed every call that one of its instances is an argument of, as PyTorch hands it
calls of its own functions; see "Extending torch" in PyTorch's documentation.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import handle_torch_function, has_torch_function

P = ParamSpec("P")
R = TypeVar("R")

OVERRIDABLE: dict[str, Callable[..., Any]] = {}
"""Functions outside of ``torch.overrides`` by the name that a client and a worker know them by."""


def overridable(function: Callable[P, R]) -> Callable[P, R]:
    """Let arguments that define ``__torch_function__`` take over calls of ``function``; enter it into OVERRIDABLE.

    Arguments are looked for one level deep in lists and tuples, as PyTorch does. They receive the decorated function,
    which is also the attribute of its module, and the arguments as they were given.
    """

    @functools.wraps(function)
    def public(*args: P.args, **kwargs: P.kwargs) -> R:
        relevant = tuple(_tensors(args, kwargs))
        # The second test leaves out modes: torch.set_default_device is one, and would not hold inside of the function.
        if has_torch_function(relevant) and any(map(_overrides, relevant)):
            return handle_torch_function(public, relevant, *args, **kwargs)
        return function(*args, **kwargs)

    OVERRIDABLE[f"{function.__module__}.{function.__qualname__}"] = public
    return public


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    for arg in (*args, *kwargs.values()):
        if isinstance(arg, (list, tuple)):
            yield from arg
        else:
            yield arg


def _overrides(arg: Any) -> bool:
    return hasattr(type(arg), "__torch_function__") and type(arg) not in (Tensor, Parameter)


@overridable
def index(tensor: Tensor, indices: Any) -> Tensor:
    """``tensor[indices]``: one of, or a tuple of, integers, slices, None, Ellipsis, and integer or boolean tensors.

    Integers and slices give a view of ``tensor``, tensors a copy. See ``torch.Tensor.__getitem__``, which as a function
    accepts a ``torch.Tensor`` alone, no handle.

    Example:
        >>> index(torch.arange(6).view(2, 3), (slice(None), 1))
        tensor([1, 4])
    """
    return tensor[indices]


add = add_scalar = torch.add
sub = torch.sub
mul = mul_scalar = torch.mul
div = torch.div
matmul = torch.matmul
cos = torch.cos
max = torch.max  # noqa: A001
min = torch.min  # noqa: A001
std = torch.std
var = torch.var
norm = torch.linalg.vector_norm  # over all elements by default, as torch.norm, which PyTorch has deprecated
gt = torch.gt
select = torch.select
narrow = torch.narrow
stack = torch.stack

_NAMES = (
    *("add", "add_scalar", "sub", "mul", "mul_scalar", "div", "matmul"),
    *("cos", "max", "min", "std", "var", "norm", "gt", "index", "select", "narrow", "stack"),
)
TENSOR_OPS: dict[str, Callable[..., Any]] = {name: globals()[name] for name in _NAMES}
"""Every operation by name, with the arguments of the PyTorch function."""
