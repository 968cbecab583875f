"""Functions that workers call later on: they run there on a copy of what they were given here."""

import dis
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

from raytorch.errors import SessionError

_STORES = {"STORE_GLOBAL", "DELETE_GLOBAL", "STORE_DEREF", "DELETE_DEREF"}
_UNCHANGED = (
    *(type(None), bool, int, float, complex, str, bytes, frozenset, range, slice, type, ModuleType, np.generic),
    *(torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format),
    *(torch.Tensor, np.ndarray),  # which hooks read; to write to one is rare, and fetch() would tell
)


def require_hooks_without_effects(values: Iterable[Any]) -> None:
    """Refuse hooks that change what they do not get as arguments: workers have a copy. Raises SessionError."""
    for value in values:
        for name in _changed_by(value, set()):
            raise SessionError(
                f"the hook would run on the workers, with a copy of {name!r}: nobody here would see what it changes. "
                "Return from it what is to change, or keep there what it notes: notes = session.object(list), then "
                "session.run(install, net, notes) with a function that registers the hook, and notes.call('copy')"
            )


def _changed_by(value: Any, seen: set[int]) -> Iterator[str]:
    """Names of what a function can change beside its arguments."""
    if id(value) in seen:
        return
    seen.add(id(value))
    match value:
        case functools.partial():
            yield from _changed_by(value.func, seen)
            for part in (*value.args, *value.keywords.values()):
                yield from _changed_by(part, seen) if callable(part) else [type(part).__name__] * (not _stays(part))
        case MethodType() | BuiltinFunctionType() if not isinstance(value.__self__, type | ModuleType | None):
            yield f"{type(value.__self__).__name__}.{value.__name__}"
        case FunctionType():
            yield from _stored_by(value.__code__, set(value.__code__.co_freevars))
            yield from _held_by(value, seen)


def _stored_by(code: CodeType, free: set[str]) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        if instruction.opname in _STORES and (instruction.opname.endswith("GLOBAL") or instruction.argval in free):
            yield str(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _stored_by(constant, free & set(constant.co_freevars))


def _held_by(function: Callable[..., Any], seen: set[int]) -> Iterator[str]:
    found = inspect.getclosurevars(function)
    held: dict[str, Any] = {**found.globals, **found.nonlocals}
    for name, value in held.items():
        if isinstance(value, FunctionType):
            if value.__module__ == function.__module__:  # others are a library's, whose state is its own
                yield from _changed_by(value, seen)
        elif not _stays(value):
            yield name


def _stays(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_stays, value))
    return isinstance(value, _UNCHANGED) or (callable(value) and not hasattr(value, "__dict__"))
