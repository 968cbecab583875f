"""Tensors in files: safetensors, and the state dicts of ``torch.save``, of which nothing is run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from raytorch.errors import ModelFileError
from raytorch.serialization.file_kinds import FileKind, require
from raytorch.serialization.pieces import piece_paths
from raytorch.serialization.refusals import StrPath, explaining_damage
from raytorch.serialization.savable import contents_of, require_readable
from raytorch.serialization.saved_tensors import open_tensors
from raytorch.serialization.torch_pickles import refuse_bombs


def load_weights(path: StrPath, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a state dict that ``torch.save`` wrote, by name.

    Nothing in the file is run, whatever it holds.

    Raises:
        ModelFileError: The file is missing, damaged, of another format, or holds more than tensors.
    """
    path = Path(path)
    if piece_paths(path) != [path] or require(path, FileKind.SAFETENSORS, FileKind.STATE_DICT) == FileKind.SAFETENSORS:
        return load_tensors(path, device)
    content = load_state(path, device)
    if not isinstance(content, dict):
        raise ModelFileError(f"{path} holds a {type(content).__name__}; expected a state dict, tensors by name")
    for name, value in content.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise ModelFileError(
                f"{path} holds a {type(value).__name__} as {name!r:.99}; expected a state dict, tensors by name; save "
                "model.state_dict() alone, or read the file with load_state"
            )
    return dict(content)


def load_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of its pieces, by name. Raises as :func:`load_weights` does."""
    with open_tensors(path) as tensors:
        return {name: tensor.read().to(device) for name, tensor in tensors.items()}


def load_state(path: StrPath, device: torch.device | str = "cpu") -> Any:
    """Read what ``torch.save`` wrote, if it is made of tensors, plain values, lists and dicts.

    Nothing in the file is run, whatever it holds, and nothing is built that is larger than what it holds.

    Raises:
        ModelFileError: The file is missing, damaged, of another format, or holds anything else.
    """
    path = Path(path)
    require(path, FileKind.STATE_DICT)
    refuse_bombs(path)
    with explaining_damage(path), path.open("rb") as file:  # from the path torch.load would judge by its suffix
        return torch.load(file, map_location=device, weights_only=True)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, with the permissions that a new file has here; those that share memory come apart.

    Raises:
        ModelFileError: One of them is of a kind that such files do not hold, or they are too many to be read again;
            nothing is written then.
    """
    require_readable(tensors, path, metadata)
    contents = contents_of(tensors)
    path.touch()
    mode = path.stat().st_mode
    save_file(contents, path, metadata)
    path.chmod(mode)  # safetensors writes what only its owner can read
