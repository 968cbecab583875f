"""What a safetensors file can hold, and be read again from."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from raytorch.errors import ModelFileError
from raytorch.serialization.file_kinds import DTYPE_NAMES, LONGEST_HEADER


def require_tensors(tensors: Mapping[str, Any], path: Path) -> None:
    """Refuse what such a file cannot hold. Raises ModelFileError."""
    for name, tensor in tensors.items():
        if problem := _problem(tensor) or _problem_of_name(name):
            raise ModelFileError(f"{path} cannot hold {name!r:.99}, {problem}; nothing was written")


def require_readable(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None) -> None:
    """Refuse what could not be written, or not be read again. Raises ModelFileError."""
    require_tensors(tensors, path)
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
    if tensor.is_nested:
        return "a nested tensor: save its unbind()"
    if tensor.layout != torch.strided:
        return f"a {tensor.layout} tensor: save its to_dense()"
    if tensor.is_quantized:
        return "a quantized tensor: save its dequantize(), or its int_repr()"
    if tensor.dtype not in DTYPE_NAMES:
        remedy = "save torch.view_as_real() of it" if tensor.is_complex() else "save it as another dtype"
        return f"a tensor of {tensor.dtype}: {remedy}"
    return None


def _problem_of_name(name: str) -> str | None:
    if name == "__metadata__":
        return "which is where the file describes itself: give it another name"
    try:
        name.encode()
    except UnicodeEncodeError:
        return "whose name is no text that a file can hold: give it another name"
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


def content_of(tensor: Tensor) -> Tensor:
    """A tensor whose memory is its elements in their order, the same if it is so already."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous()


def contents_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors takes them: without views that change what they are of, no two in the same memory."""
    contents: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        content = content_of(tensor)
        memory = content.untyped_storage().data_ptr()
        contents[name] = content.clone() if memory in taken else content
        taken.add(memory)
    return contents
