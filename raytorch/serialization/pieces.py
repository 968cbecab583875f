"""Tensors in pieces over several safetensors files, with a checksum for each 256 KiB of them.

Each process writes what it has of tensors that are divided. Under ``pieces`` in a file's metadata stands, as JSON,
where each of its tensors begins in the whole one, what shape that has, and its checksums, a CRC-32 for each block::

    {"save": "1f0c", "tensors": {"weight": {"shape": [6, 4], "offsets": [3, 0], "crc32": "1c291ca3"}}}

Files without it hold whole tensors. Any reader of safetensors reads the files, each with the pieces that it has.
"""

import json
import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raytorch.serialization.file_kinds import DTYPE_NAMES
from raytorch.serialization.savable import content_of, require_readable, require_tensors

BLOCK = 2**18
"""Bytes of which each has a checksum."""
PIECES_KEY = "pieces"
"""Where a file's metadata tells of its pieces."""


class Piece(NamedTuple):
    """A part of a tensor."""

    tensor: Tensor
    shape: tuple[int, ...]
    """Of the whole."""
    offsets: tuple[int, ...]
    """Where the part begins in each dimension."""


def whole(tensor: Tensor) -> Piece:
    """A tensor that is in one piece.

    Example:
        >>> whole(torch.zeros(2, 3)).offsets
        (0, 0)
    """
    return Piece(tensor, tuple(tensor.shape), (0,) * tensor.dim())


def piece_path(path: Path, number: int, of: int) -> Path:
    """The file with the pieces of a process, counted from 0, of so many that write ``path`` together.

    Example:
        >>> piece_path(Path("model.safetensors"), 0, 4).name
        'model-00001-of-00004.safetensors'
    """
    return path.with_name(f"{path.stem}-{number + 1:05d}-of-{of:05d}{path.suffix}")


def piece_paths(path: Path) -> list[Path]:
    """The files that a safetensors file is in: itself, or, where it is not there, those of :func:`piece_path`."""
    if path.exists() or not path.parent.is_dir():
        return [path]
    return sorted(each for each in path.parent.iterdir() if is_piece(each.name, path.name)) or [path]


def is_piece(file: str, of: str) -> bool:
    """Tell whether a file's name is one that :func:`piece_path` gives for a file of the name ``of``."""
    stem, suffix = Path(of).stem, Path(of).suffix
    return bool(re.fullmatch(rf"{re.escape(stem)}-[0-9]{{5}}-of-[0-9]{{5}}{re.escape(suffix)}", file))


def counted(path: Path) -> tuple[int, int]:
    """The number of a file of :func:`piece_path`, from 1, and of how many it is; zeros of any other."""
    match = re.fullmatch(r".*-([0-9]{5})-of-([0-9]{5})\.[a-z]+", path.name)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def require_writable(pieces: Mapping[str, Piece], path: Path, metadata: Mapping[str, str]) -> None:
    """Raise ModelFileError for what :func:`write_pieces` cannot write, or nobody could read again."""
    tensors = {name: piece.tensor for name, piece in pieces.items()}
    require_tensors(tensors, path)
    sums = {name: "0" * 8 * blocks(piece.tensor.nbytes) for name, piece in pieces.items()}
    require_readable(tensors, path, {**metadata, PIECES_KEY: _described("0" * 32, pieces, sums)})


def write_pieces(pieces: Mapping[str, Piece], path: Path, save: str, metadata: Mapping[str, str]) -> bytes:
    """Write pieces into a new file, one after the other from wherever they are; answers its header, with which the file
    can be told from any other.

    Args:
        pieces: By the name of the tensor.
        path: The file.
        save: A text that the files that belong together have in common.
        metadata: What else the file says of itself.
    """
    tensors = {name: pieces[name].tensor for name in sorted(pieces, key=_largest_elements_first(pieces))}
    sums = {name: "0" * 8 * blocks(tensor.nbytes) for name, tensor in tensors.items()}
    with path.open("xb") as file:
        file.write(_header(tensors, {**metadata, PIECES_KEY: _described(save, pieces, sums)}))
        for name, tensor in tensors.items():
            view = bytes_of(content_of(tensor.cpu()))
            file.write(view)
            sums[name] = checksums(view)
        head = _header(tensors, {**metadata, PIECES_KEY: _described(save, pieces, sums)})
        file.seek(0)
        file.write(head)
    return head


def _largest_elements_first(pieces: Mapping[str, Piece]) -> Callable[[str], Any]:
    """An order in which each tensor begins at a multiple of its elements' size."""
    return lambda name: (-pieces[name].tensor.element_size(), name)


def _described(save: str, pieces: Mapping[str, Piece], sums: Mapping[str, str]) -> str:
    tensors = {
        name: {"shape": list(piece.shape), "offsets": list(piece.offsets), "crc32": sums[name]}
        for name, piece in pieces.items()
    }
    return json.dumps({"save": save, "tensors": tensors}, separators=(",", ":"))


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        shape = list(tensor.shape)
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def bytes_of(content: Tensor) -> memoryview:
    """A tensor's memory, which is its elements in their order."""
    memory: Any = content.reshape(-1).view(torch.uint8).numpy()
    return memoryview(memory)


def blocks(nbytes: int) -> int:
    """How many blocks so many bytes are."""
    return -(-nbytes // BLOCK)


def checksums(content: memoryview) -> str:
    """The checksums of the blocks of a tensor, or of some of them, one behind the other."""
    return "".join(f"{zlib.crc32(content[begin : begin + BLOCK]):08x}" for begin in range(0, len(content), BLOCK))
