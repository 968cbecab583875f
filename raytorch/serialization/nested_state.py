"""Nested state in two files that can run no code: its structure as JSON, its tensors as safetensors.

In the JSON a tensor is ``{"$tensor": "3"}``, by its name in the safetensors file, and a dictionary with numbers as keys
``{"$items": [[1, "one"]]}``. Everything else is what JSON has: dictionaries with text as keys, lists, numbers, text,
true, false and null. Numbers come back to the last bit, and tuples as lists.
"""

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from raytorch.errors import ModelFileError
from raytorch.serialization.weights import load_tensors, save_tensors
from raytorch.system.regular_files import open_regular
from raytorch.system.strict_json import NOT_FINITE, text_of

STRUCTURE_FILE = "state.json"
TENSORS_FILE = "state.safetensors"
LARGEST_STRUCTURE = 16 * 2**20
"""Bytes of the JSON at most: room for the optimizer of some 100,000 parameters."""

_TENSOR, _NUMBER, _ITEMS = "$tensor", "$number", "$items"


def save_state(state: dict[str, Any], folder: Path) -> None:
    """Write nested dictionaries and lists, of tensors and of what JSON has, as two files into a folder.

    Raises ModelFileError: there is more than could be read again; nothing is written then.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_packed(state, tensors))  # ASCII: a byte for each character
    if len(text) > LARGEST_STRUCTURE:
        raise ModelFileError(
            f"{folder / STRUCTURE_FILE} would have {len(text):,} bytes, and at most {LARGEST_STRUCTURE:,} can be read "
            "again: keep less that is no tensor; nothing was written"
        )
    save_tensors(tensors, folder / TENSORS_FILE)
    (folder / STRUCTURE_FILE).write_text(text, encoding="utf-8")


def require_savable(state: Any) -> None:
    """Raise TypeError for what :func:`save_state` cannot write."""
    json.dumps(_packed(state, {}))


def _packed(value: Any, tensors: dict[str, Tensor]) -> Any:
    match value:
        case Tensor():
            name = str(len(tensors))
            tensors[name] = value
            return {_TENSOR: name}
        case float() if text := text_of(value):
            return {_NUMBER: text}
        case dict() if not value.keys() & {_TENSOR, _NUMBER, _ITEMS} and all(isinstance(key, str) for key in value):
            return {key: _packed(part, tensors) for key, part in value.items()}
        case dict() if all(type(key) is int for key in value):
            return {_ITEMS: [[key, _packed(part, tensors)] for key, part in value.items()]}
        case dict():
            raise TypeError(f"keys {[*value]!r:.99}; they must be text, or whole numbers, and {_TENSOR} is a tensor's")
        case list() | tuple():
            return [_packed(part, tensors) for part in value]
        case None | bool() | int() | float() | str():
            return value
        case _:
            raise TypeError(f"a {type(value).__name__}; what is saved is of tensors, numbers, text, lists and mappings")


def load_saved_state(folder: Path) -> dict[str, Any]:
    """Read what :func:`save_state` wrote; nothing in the files is run, and nothing larger than they are is built.

    Raises ModelFileError: one of them is missing, damaged, or not what it should be.
    """
    path = folder / STRUCTURE_FILE
    structure = _read_json(path)
    # As the file has them the tensors lie at odd addresses, where products are slower and their last bits others.
    tensors = {name: tensor.clone() for name, tensor in load_tensors(folder / TENSORS_FILE).items()}

    def unpacked(value: Any) -> Any:
        if isinstance(value, dict) and _TENSOR in value:
            return tensors.pop(value[_TENSOR])
        if isinstance(value, dict) and _ITEMS in value:
            return {int(key): unpacked(it) for key, it in value[_ITEMS]}
        if isinstance(value, dict) and _NUMBER in value:
            return NOT_FINITE[value[_NUMBER]]
        if isinstance(value, dict):
            return {key: unpacked(it) for key, it in value.items()}
        return [unpacked(it) for it in value] if isinstance(value, list) else value

    try:
        state = unpacked(structure)
    except (KeyError, TypeError, ValueError, RecursionError):
        raise _damaged(
            path, f"it names a tensor that {TENSORS_FILE} does not have, or twice, or no number, or is nested too deep"
        ) from None
    if not isinstance(state, dict):
        raise _damaged(path, f"it holds a {type(state).__name__}, not an object")
    return state


def _read_json(path: Path) -> Any:
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            content = file.read(LARGEST_STRUCTURE + 1)
        if len(content) > LARGEST_STRUCTURE:
            raise _damaged(path, f"it has more than {LARGEST_STRUCTURE:,} bytes")
        return json.loads(content)
    except FileNotFoundError:
        raise ModelFileError(f"{path}: no such file") from None
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror or error}; expected a file of JSON") from None
    except (ValueError, RecursionError):
        raise _damaged(path, "it is not JSON") from None


def _damaged(path: Path, reason: str) -> ModelFileError:
    return ModelFileError(f"{path} is damaged: {reason}; write it again, or fetch it again")
