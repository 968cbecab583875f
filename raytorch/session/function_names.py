"""Names of the functions that an instruction can call, the same on the client and on the workers."""

import functools
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.overrides import get_overridable_functions, resolve_name

from raytorch import autograd, distributed, tensor_ops  # noqa: F401 - they fill OVERRIDABLE
from raytorch.errors import UnknownFunctionError
from raytorch.session import worker_functions
from raytorch.tensor_ops import OVERRIDABLE

FACTORIES = (
    *("arange", "empty", "empty_permuted", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand"),
    *("randint", "randn", "randperm", "scalar_tensor", "tril_indices", "triu_indices", "zeros"),
)
"""Functions of torch that make a tensor from numbers alone: a session's methods of the same names."""

ON_LISTS = (
    "torch.nn.utils.clip_grad_norm_",
    "torch.nn.utils.clip_grad_value_",
    "torch.nn.utils.clip_grads_with_norm_",
    "torch.nn.utils.get_total_norm",
    "torch.nn.utils.parameters_to_vector",
    "torch.nn.utils.vector_to_parameters",
    "torch.nn.utils.rnn.pack_padded_sequence",
    "torch.nn.utils.rnn.unpad_sequence",
)
"""Functions of many tensors that PyTorch does not hand to handles; see :mod:`raytorch.session.interception`."""

_OTHERS = ("torch.random.manual_seed", *ON_LISTS)
_UNLISTED = {
    "torch.nn.functional": torch.nn.functional,
    "torch.nn.init": torch.nn.init,
    "torch": torch._C._VariableFunctions,
    **{f"torch._C.{name}": getattr(torch._C, name) for name in ("_nn", "_linalg", "_fft", "_sparse", "_nested")},
}
"""Where PyTorch has functions that it hands to handles too, but that ``torch.overrides`` does not list."""
_DISPATCHED = "torch.ops."


def name_of(function: Callable[..., Any]) -> str:
    """The name under which the workers know ``function``. Raises UnknownFunctionError: it takes no handles."""
    if isinstance(function, OpOverload | OpOverloadPacket):
        return f"{_DISPATCHED}{function}"
    try:
        return _names()[function]
    except (KeyError, TypeError):
        raise UnknownFunctionError(
            f"{getattr(function, '__qualname__', function)} cannot be recorded; run it on the workers with "
            "session.run(function, ...)"
        ) from None


def function_named(name: str) -> Callable[..., Any]:
    """The function of that name. Raises UnknownFunctionError: this worker's PyTorch has none."""
    function = _operator(name) if name.startswith(_DISPATCHED) else _functions().get(name)
    if function is None:
        raise UnknownFunctionError(f"PyTorch {torch.__version__} on this worker has no function {name}")
    return function


def changes_first_argument(name: str) -> bool:
    """True if a function works in place on its first argument, and returns it: ``add_``, ``__iadd__``, ``relu_``."""
    if name in ON_LISTS:
        return False
    last = name.rpartition(".")[2]
    if last.startswith("__"):
        return last in _IN_PLACE_OPERATORS
    return last.endswith("_")


def is_operator(name: str) -> bool:
    """Tell whether a function is one of Python's operators, with operands: not of indexing, nor of an attribute."""
    last = name.rpartition(".")[2]
    return last.startswith("__") and last not in ("__getitem__", "__setitem__", "__get__", "__set__")


def gives_value(name: str) -> bool:
    """Tell whether a function is known to give no tensor, so that its failure can be raised at once."""
    if name.endswith(".__get__"):
        return name.split(".")[-2] not in ("T", "H", "mT", "mH", "real", "imag", "data", "grad")
    last = name.rpartition(".")[2]
    return last.startswith("is_") or last in _VALUE_FUNCTIONS


def may_grow(name: str) -> bool:
    """True if a call can let values that have handles hold more than they did, or less, otherwise than in place."""
    return name.endswith(".__set__") or name in _GROWING


def is_collective(name: str) -> bool:
    """Tell whether a function communicates, so that every rank has to call it."""
    return name.startswith("raytorch.distributed.collectives.")


def is_backward(name: str) -> bool:
    """Tell whether a function runs a backward pass, which communicates if gradients are averaged."""
    return name in ("torch.Tensor.backward", "raytorch.autograd.backward")


def may_communicate(name: str) -> bool:
    """Tell whether ranks may communicate in a function when all of them call it."""
    return is_collective(name) or is_backward(name) or name in _OF_OWN_CODE


_OF_OWN_CODE = {f"raytorch.session.{primitive}" for primitive in ("create", "call", "method", "apply", "restore")}
_GROWING = {
    *("torch.Tensor.backward", "torch.Tensor.retain_grad", "raytorch.autograd.backward"),
    *(f"raytorch.session.{primitive}" for primitive in ("create", "call", "method", "set_attribute", "load_state")),
}
_VALUE_FUNCTIONS = {
    *("allclose", "data_ptr", "dim", "element_size", "equal", "get_device", "item", "ndimension", "nelement", "numel"),
    *("size", "storage_offset", "stride", "tolist", "type"),
    *("__bool__", "__complex__", "__contains__", "__float__", "__index__", "__int__", "__len__"),
}
BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift")
"""Python's operators of two operands: each is a method ``__add__``, the other operand's ``__radd__``, and in place
``__iadd__``."""
_IN_PLACE_OPERATORS = {*(f"__i{name}__" for name in BINARY), "__idiv__", "__setitem__"}


@functools.cache
def _functions() -> dict[str, Callable[..., Any]]:
    return {name: function for function, name in _names().items()}


@functools.cache
def _names() -> dict[Callable[..., Any], str]:
    names: dict[Callable[..., Any], str] = {}
    for name, function in _named():
        names.setdefault(function, name)
    return names


def _named() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Functions with their names; of several names of one function the first counts."""
    for functions in get_overridable_functions().values():
        yield from ((str(resolve_name(function)), function) for function in functions)
    yield from _methods()
    yield from (
        (name, pkgutil.resolve_name(name)) for name in (*(f"torch.{factory}" for factory in FACTORIES), *_OTHERS)
    )
    yield from (OVERRIDABLE | worker_functions.PRIMITIVES).items()
    yield from _unlisted()


def _methods() -> Iterator[tuple[str, Callable[..., Any]]]:
    for name, method in inspect.getmembers(torch.Tensor, inspect.isroutine):
        if not name.startswith("_") or name == "__iter__":
            yield f"torch.Tensor.{name}", method
    for name in SETTABLE:
        yield f"torch.Tensor.{name}.__set__", getattr(torch.Tensor, name).__set__


def _unlisted() -> Iterator[tuple[str, Callable[..., Any]]]:
    for module, members in _UNLISTED.items():
        for name, function in inspect.getmembers(members, inspect.isroutine):
            if not name.startswith("__") and function.__module__ in (module, None):
                yield f"{module}.{name}", function


def _operator(name: str) -> Callable[..., Any] | None:
    """An operator of PyTorch's dispatcher: ``torch.ops.aten.mul``, ``torch.ops.aten.mul.Scalar``."""
    found: Any = torch.ops
    for part in name.removeprefix(_DISPATCHED).split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, OpOverload | OpOverloadPacket) else None


SETTABLE = ("grad", "data", "requires_grad")
"""Attributes of a tensor that can be assigned to."""
