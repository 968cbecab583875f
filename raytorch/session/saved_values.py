"""Values of a saved session as JSON: a fixed set of kinds, with names for tensors, objects and PyTorch's own classes.

Null, true, false, whole numbers, finite floats and strings stand for themselves and lists for lists. All else is an
object of one key, which says what it is; docs/saved-sessions.md has them all.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from raytorch.errors import SessionError
from raytorch.session.saved_names import ACTIVATIONS, DTYPES, STATEFUL, name_of

DEEPEST = 50
"""Levels of values in values."""
_LARGEST_INTEGER = 2**63


class Unsaved(Exception):  # noqa: N818 - a signal
    """A value cannot be saved."""


class Naming(Protocol):
    """Gives the name of a value while a session is saved, or raises Unsaved; and the value of a name while it is
    restored, or SessionError: of a tensor, an object, which has a state, and a value of the user's own."""

    def tensor(self, of: Any, /) -> Any: ...
    def object(self, of: Any, /) -> Any: ...
    def own(self, of: Any, /) -> Any: ...


def encode(value: Any, names: Naming, depth: int = 0) -> Any:
    """A value as JSON. Raises Unsaved."""
    if depth > DEEPEST:
        raise Unsaved(f"its arguments are nested in more than {DEEPEST} levels")
    kind = type(value)
    if value is None or kind in (bool, str) or (kind is int and abs(value) < _LARGEST_INTEGER):
        return value
    if kind in _SEQUENCES:
        parts = [encode(part, names, depth + 1) for part in value]
        return {_SEQUENCES[kind]: parts} if _SEQUENCES[kind] else parts
    if kind in (dict, Counter):
        pairs = [[encode(part, names, depth + 1) for part in pair] for pair in value.items()]
        return {"dict" if kind is dict else "counter": pairs}
    if kind in _WORDS:
        word, write = _WORDS[kind]
        return {word: write(value)}
    return _encode_other(value, names, depth)


def _encode_other(value: Any, names: Naming, depth: int) -> Any:
    if isinstance(value, np.generic):
        return encode(value.item(), names, depth + 1)
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, Tensor):
        return {"tensor": names.tensor(value)}
    if isinstance(value, STATEFUL):
        return {"object": names.object(value)}
    name = name_of(value)
    return {"function": name} if name in ACTIVATIONS else {"own": names.own(value)}


_SEQUENCES: dict[type, str] = {list: "", tuple: "tuple", torch.Size: "size"}
_WORDS: dict[type, tuple[str, Callable[[Any], Any]]] = {
    complex: ("complex", lambda value: [str(value.real), str(value.imag)]),
    torch.dtype: ("dtype", lambda value: str(value).removeprefix("torch.")),
    torch.device: ("device", str),
}


def decode(value: Any, named: Naming, depth: int = 0) -> Any:
    """The value that :func:`encode` wrote. Raises SessionError: of no known kind, or it names what is not there."""
    if depth > DEEPEST:
        raise SessionError(f"its values are nested in more than {DEEPEST} levels")
    if value is None or isinstance(value, bool | int | float | str):
        if isinstance(value, int) and abs(value) >= _LARGEST_INTEGER:
            raise SessionError(f"the number {str(value)[:20]}... is out of range")
        return value
    if isinstance(value, list):
        return [decode(part, named, depth + 1) for part in value]
    if isinstance(value, dict) and len(value) == 1:
        ((kind, content),) = value.items()
        if kind in _READERS:
            wanted, read = _READERS[kind]
            if type(content) is wanted:
                return read(content, named, depth)
    raise SessionError(f"{str(value)[:80]!r} is no value of a saved session")


def _pairs(content: list[Any], named: Naming, depth: int) -> list[tuple[Any, Any]]:
    pairs = [decode(pair, named, depth + 1) for pair in content]
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise SessionError("a dictionary is not a list of pairs")
    return [(key, part) for key, part in pairs]


def _sizes(content: list[Any]) -> torch.Size:
    if not all(type(size) is int and 0 <= size < _LARGEST_INTEGER for size in content):
        raise SessionError("a size is no list of whole numbers")
    return torch.Size(content)


def _complex(content: list[Any]) -> complex:
    real, imaginary = map(_float, content)
    return complex(real, imaginary)


def _float(text: Any) -> float:
    if not isinstance(text, str) or len(text) > _LONGEST_NUMBER:
        raise SessionError(f"{str(text)[:80]!r} is no number")
    return float(text)


def _one_of(table: dict[str, Any], name: str, what: str) -> Any:
    if name not in table:
        raise SessionError(f"{name[:80]!r} is no {what} that a saved session may name")
    return table[name]


_LONGEST_NUMBER = 40
_READERS: dict[str, tuple[type, Callable[[Any, Naming, int], Any]]] = {
    "tuple": (list, lambda content, named, depth: tuple(decode(content, named, depth + 1))),
    "dict": (list, lambda content, named, depth: dict(_pairs(content, named, depth))),
    "counter": (list, lambda content, named, depth: Counter(dict(_pairs(content, named, depth)))),
    "size": (list, lambda content, named, depth: _sizes(content)),
    "complex": (list, lambda content, named, depth: _complex(content)),
    "float": (str, lambda content, named, depth: _float(content)),
    "dtype": (str, lambda content, named, depth: _one_of(DTYPES, content, "dtype")),
    "device": (str, lambda content, named, depth: torch.device(content)),
    "function": (str, lambda content, named, depth: _one_of(ACTIVATIONS, content, "function")),
    "tensor": (str, lambda content, named, depth: named.tensor(content)),
    "object": (int, lambda content, named, depth: named.object(content)),
    "own": (int, lambda content, named, depth: named.own(content)),
}
