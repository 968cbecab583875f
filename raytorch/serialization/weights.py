"""Tensors in files: safetensors, and the state dicts of ``torch.save``, of which nothing is run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.parameter import is_lazy

from raytorch.errors import ModelFileError
from raytorch.serialization.file_kinds import DTYPE_NAMES, LONGEST_HEADER, FileKind, read_safetensors_header, require
from raytorch.serialization.refusals import StrPath, explaining_damage
from raytorch.serialization.torch_pickles import refuse_bombs


def load_weights(path: StrPath, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a state dict that ``torch.save`` wrote, by name.

    Nothing in the file is run, whatever it holds.

    Raises:
        ModelFileError: The file is missing, damaged, of another format, or holds more than tensors.
    """
    path = Path(path)
    if require(path, FileKind.SAFETENSORS, FileKind.STATE_DICT) == FileKind.SAFETENSORS:
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
    """The tensors of a safetensors file, by name. Raises ModelFileError as :func:`load_weights` does."""
    require(path, FileKind.SAFETENSORS)
    read_safetensors_header(path)
    with explaining_damage(path):
        return load_file(path, device=str(device))


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
    _require_readable(tensors, path, metadata)
    contents = _contents(tensors)
    path.touch()
    mode = path.stat().st_mode
    save_file(contents, path, metadata)
    path.chmod(mode)  # safetensors writes what only its owner can read


def _require_readable(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None) -> None:
    """Refuse what could not be written, or not be read again."""
    for name, tensor in tensors.items():
        if problem := _problem(tensor):
            raise ModelFileError(f"{path} cannot hold {name!r:.99}, {problem}; nothing was written")
    length = _longest_header(tensors, metadata)
    if length > LONGEST_HEADER:
        raise ModelFileError(
            f"{path} would have a header of {length:,} bytes for {len(tensors):,} tensors, and at most "
            f"{LONGEST_HEADER:,} can be read again: save fewer of them in one file; nothing was written"
        )


def _problem(tensor: Any) -> str | None:
    """Why safetensors cannot hold something, with the remedy; None if it can."""
    if not isinstance(tensor, Tensor):
        return f"a {type(tensor).__name__}: give tensors alone"
    if is_lazy(tensor) or tensor.is_meta:
        return "which has no content yet: give it some first"
    if tensor.layout != torch.strided:
        return f"a {tensor.layout} tensor: save its to_dense()"
    if tensor.is_quantized:
        return "a quantized tensor: save its dequantize(), or its int_repr()"
    if tensor.dtype not in DTYPE_NAMES:
        remedy = "save torch.view_as_real() of it" if tensor.is_complex() else "save it as another dtype"
        return f"a tensor of {tensor.dtype}: {remedy}"
    return None


def _longest_header(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None) -> int:
    """Bytes of the header at most, as no tensor's place has more digits than the end of all."""
    end = sum(tensor.nbytes for tensor in tensors.values())
    header: dict[str, Any] = {
        name: {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end]}
        for name, tensor in tensors.items()
    }
    text = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":"), ensure_ascii=False)
    return len(text.encode(errors="replace")) + 8  # spaces, for the tensors to begin at a multiple of 8


def _contents(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors takes them: without views that change what they are of, no two in the same memory."""
    contents: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        content = tensor.detach().resolve_conj().resolve_neg().contiguous()
        memory = content.untyped_storage().data_ptr()
        contents[name] = content.clone() if memory in taken else content
        taken.add(memory)
    return contents
