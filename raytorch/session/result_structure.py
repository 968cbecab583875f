"""Results of unknown structure: what can leave the worker is told to the client, what cannot is named by handles."""

from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raytorch.session.pickling import dumps
from raytorch.session.program import sequence_builder
from raytorch.session.registry import HandleKind, kind_of
from raytorch.session.tensor_transfer import INLINE, Payload

Description = tuple[Any, ...]
"""One of ``("value", value)``, ``("payload", *words)`` for a small payload, ``("held", kind)``,
``("sequence", type, descriptions)`` and ``("mapping", keys, descriptions, type)``."""

PLAIN = (
    *(type(None), type(NotImplemented), bool, int, float, complex, str, bytes),
    *(torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format),
    *(np.ndarray, np.generic, Payload),
)
"""Types whose values are sent to the client as they are."""


def describe(value: Any, held: list[Any]) -> Description:
    """The structure of ``value``; what has to stay on the worker is appended to ``held``. Raises: it cannot be sent."""
    if isinstance(value, Payload) and value.nbytes <= INLINE:
        return ("payload", *value.words())
    if isinstance(value, PLAIN):
        _require_portable(value)
        return ("value", value)
    if isinstance(value, tuple | list):
        _require_portable(type(value))
        return ("sequence", type(value), [describe(part, held) for part in value])
    if isinstance(value, dict):
        for key in value:
            _require_portable(key)
        return ("mapping", list(value), [describe(part, held) for part in value.values()], _mapping_type(value))
    held.append(value)
    return ("held", kind_of(value))


def _require_portable(value: Any) -> None:
    is_array_of_numbers = type(value) is np.ndarray and value.dtype != object
    if not (type(value) in _PORTABLE or is_array_of_numbers or value is list or value is tuple):
        dumps(value)


_PORTABLE = {*PLAIN} - {np.ndarray, np.generic}
"""Types whose values can be pickled whatever they are."""


def rebuilt(value: Any, kind: type, convert: Callable[[Any], Any]) -> Any:
    """``value`` with all of type ``kind`` converted, in lists, tuples and dictionaries of the types that they had."""
    if isinstance(value, kind):
        return convert(value)
    if isinstance(value, dict):
        return _mapping_type(value)({key: rebuilt(part, kind, convert) for key, part in value.items()})
    if isinstance(value, tuple | list):
        return sequence_builder(type(value))([rebuilt(part, kind, convert) for part in value])
    return value


def _mapping_type(value: dict[Any, Any]) -> type[dict[Any, Any]]:
    """The type of a dictionary, if a plain one is all that is needed to make it."""
    return type(value) if type(value) in (OrderedDict, Counter) else dict


def rebuild(description: Description, take: Callable[[HandleKind], Any]) -> Any:
    """The result on the client; ``take`` gives the object that stands for the next value that stayed on the worker."""
    match description[0]:
        case "value":
            return description[1]
        case "payload":
            return Payload.of_words(*description[1:])
        case "held":
            return take(description[1])
        case "sequence":
            return sequence_builder(description[1])([rebuild(part, take) for part in description[2]])
        case "mapping":
            kind = description[3]
            return kind({key: rebuild(part, take) for key, part in zip(*description[1:3], strict=True)})
    raise ValueError(f"{description!r} is no description")


def count_held(description: Description) -> int:
    """How many values stayed on the worker."""
    if description[0] in ("sequence", "mapping"):
        return sum(map(count_held, description[2]))
    return int(description[0] == "held")


def is_tensor(description: Description) -> bool:
    """Tell whether the result is one tensor."""
    return description == ("held", HandleKind.TENSOR)


def is_large(description: Description) -> bool:
    """Tell whether it holds an array that is better moved by Ray than pickled."""
    if description[0] in ("sequence", "mapping"):
        return any(map(is_large, description[2]))
    return description[0] == "value" and isinstance(description[1], Payload)


def shapes_of(values: Any) -> str:
    """The arguments of a call for an error message: shapes and dtypes of tensors, other values as they are."""
    return ", ".join(_brief(value) for value in values)


def _brief(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"[{shapes_of(value[:8])}{', ...' if len(value) > 8 else ''}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_brief(part)}' for key, part in list(value.items())[:8])}}}"
    if not isinstance(value, (*PLAIN, slice, type(...))):
        return getattr(value, "__qualname__", type(value).__name__)  # repr may be long, or fail
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
