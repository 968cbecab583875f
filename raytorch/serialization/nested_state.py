"""Nested state in two parts that can run no code: its structure as JSON, and its tensors by name.

In the JSON a tensor is ``{"$tensor": "optimizer/state/0/exp_avg"}``, by the keys that lead to it, and a dictionary with
numbers as keys ``{"$items": [[1, "one"]]}``. Everything else is what JSON has: dictionaries with text as keys, lists,
numbers, text, true, false and null. Numbers come back to the last bit, and tuples as lists.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from raytorch.errors import ModelFileError
from raytorch.serialization.saved_tensors import SavedTensor
from raytorch.system.strict_json import NOT_FINITE, text_of

LARGEST_STRUCTURE = 16 * 2**20
"""Bytes of the JSON at most: room for the optimizer of some 100,000 parameters."""

_TENSOR, _NUMBER, _ITEMS = "$tensor", "$number", "$items"


def packed_state(state: Mapping[str, Any], path: Path) -> tuple[str, dict[str, Tensor]]:
    """Take nested dictionaries and lists apart, of tensors and of what JSON has: into a text and the tensors.

    Raises TypeError for what is neither, and ModelFileError: the text, of the file ``path``, is longer than could be
    read again.

    Example:
        >>> text, tensors = packed_state({"mean": [torch.zeros(2), 0.5]}, Path("state.json"))
        >>> text, [*tensors]
        ('{"mean": [{"$tensor": "mean/0"}, 0.5]}', ['mean/0'])
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_packed(state, tensors, ""))  # ASCII: a byte for each character
    if len(text) > LARGEST_STRUCTURE:
        raise ModelFileError(
            f"{path} would have {len(text):,} bytes, and at most {LARGEST_STRUCTURE:,} can be read again: keep less "
            "that is no tensor; nothing was written"
        )
    return text, tensors


def require_savable(state: Any) -> None:
    """Raise TypeError for what :func:`packed_state` cannot take apart."""
    json.dumps(_packed(state, {}, ""))


def _packed(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    match value:
        case Tensor():
            tensors[name] = value
            return {_TENSOR: name}
        case float() if text := text_of(value):
            return {_NUMBER: text}
        case dict():
            return _packed_mapping(value, tensors, name)
        case list() | tuple():
            return [_packed(part, tensors, _below(name, number)) for number, part in enumerate(value)]
        case None | bool() | int() | float() | str():
            return value
        case _:
            raise TypeError(f"a {type(value).__name__}; what is saved is of tensors, numbers, text, lists and mappings")


def _packed_mapping(value: dict[Any, Any], tensors: dict[str, Tensor], name: str) -> Any:
    packed = {key: _packed(part, tensors, _below(name, key)) for key, part in value.items()}
    if not value.keys() & {_TENSOR, _NUMBER, _ITEMS} and all(isinstance(key, str) for key in value):
        return packed
    if all(type(key) is int for key in value):
        return {_ITEMS: [[key, part] for key, part in packed.items()]}
    raise TypeError(f"keys {[*value]!r:.99}; they must be text, or whole numbers, and {_TENSOR} is a tensor's")


def _below(name: str, key: Any) -> str:
    """The name of what is at a key, as JSON pointers have it (RFC 6901); halves of characters, which no file's text can
    hold, by their numbers.
    """
    own = str(key).replace("~", "~0").replace("/", "~1")
    own = "".join(f"~u{ord(each):04x}" if "\ud800" <= each <= "\udfff" else each for each in own)
    return f"{name}/{own}" if name else own


def unpacked_state(text: bytes, tensors: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Put together what :func:`packed_state` took apart; nothing is run, and nothing larger than the parts is built.

    Raises ModelFileError: the text, of the file ``path``, is damaged, or not what it should be.
    """
    if len(text) > LARGEST_STRUCTURE:
        raise _damaged(path, f"it has more than {LARGEST_STRUCTURE:,} bytes")
    try:
        structure = json.loads(text)
    except (ValueError, RecursionError):
        raise _damaged(path, "it is not JSON") from None
    try:
        state = _unpacked(structure, dict(tensors))
    except (KeyError, TypeError, ValueError, RecursionError):
        raise _damaged(
            path,
            f"it names a tensor that {path.stem}.safetensors does not have, or twice, or no number, or is nested too "
            "deep",
        ) from None
    if not isinstance(state, dict):
        raise _damaged(path, f"it holds a {type(state).__name__}, not an object")
    return state


def _unpacked(value: Any, tensors: dict[str, Any]) -> Any:
    if isinstance(value, list):
        return [_unpacked(it, tensors) for it in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors.pop(
            value[_TENSOR]
        )  # an optimizer would make one of its own parameter's type of each that it has
    if _ITEMS in value:
        return {int(key): _unpacked(it, tensors) for key, it in value[_ITEMS]}
    if _NUMBER in value:
        return NOT_FINITE[value[_NUMBER]]
    return {key: _unpacked(it, tensors) for key, it in value.items()}


def in_memory(state: Any) -> Any:
    """Nested state of which all tensors are read that are in files until then."""
    if isinstance(state, SavedTensor):
        return state.read()
    if isinstance(state, dict):
        return {key: in_memory(part) for key, part in state.items()}
    return [in_memory(part) for part in state] if isinstance(state, list) else state


def _damaged(path: Path, reason: str) -> ModelFileError:
    return ModelFileError(f"{path} is damaged: {reason}; write it again, or fetch it again")
