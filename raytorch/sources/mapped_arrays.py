"""The arrays in a file, memory-mapped: .npy, .npz and .safetensors. Nothing is unpickled."""

import json
import math
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tokenize import TokenError
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.lib import format as npy

from raytorch.errors import DataError

Array = np.ndarray[Any, Any]

SUFFIXES = (".npy", ".npz", ".safetensors")
_OFFSET_OF_NAME = 30
_MOST_HEADER = 100 * 2**20
_SAFETENSORS = {
    **{f"F{8 * size}": (f"<f{size}", None) for size in (2, 4, 8)},
    **{f"I{8 * size}": (f"<i{size}", None) for size in (1, 2, 4, 8)},
    **{f"U{8 * size}": (f"<u{size}", None) for size in (1, 2, 4, 8)},
    "BOOL": ("?", None),
    "BF16": ("<u2", torch.bfloat16),
    "F8_E4M3": ("u1", torch.float8_e4m3fn),
    "F8_E5M2": ("u1", torch.float8_e5m2),
}


class MappedArray(NamedTuple):
    """An array that is read from its file where it is asked for."""

    content: Array
    kind: torch.dtype | None = None
    """What the numbers are where NumPy has none such."""

    @property
    def form(self) -> str:
        """The type and the shape of an entry."""
        kind = str(self.kind).removeprefix("torch.") if self.kind else self.content.dtype.name
        return f"{kind} {list(self.content.shape[1:])}"

    def tensor(self, entries: Array) -> torch.Tensor:
        """Numbers of the array as a tensor."""
        native = np.ascontiguousarray(entries, entries.dtype.newbyteorder("="))
        return torch.from_numpy(native) if self.kind is None else torch.from_numpy(native).view(self.kind)


def mapped_arrays(path: Path, place: str) -> dict[str, MappedArray]:
    """The arrays of a file by their names; that of an ``.npy`` file is its own. Raises DataError that names ``place``,
    where it is for its user: the file may be a copy of another name.

    Example:
        >>> mapped_arrays(Path("data/x.npy"), "data/x.npy")["x"].content.shape
        (30, 3)
    """
    named = PurePosixPath(place)
    suffix = named.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{place}: expected arrays, of a name that ends with {', '.join(SUFFIXES)}")
    with _telling(place, f"{'a' if suffix == '.safetensors' else 'an'} {suffix} file, whole and undamaged"):
        if suffix == ".npz":
            return dict(_of_npz(path, place))
        if suffix == ".safetensors":
            return dict(_of_safetensors(path, place))
        return {named.stem: _of_npy(path, 0, path.stat().st_size, place)}


@contextmanager
def _telling(place: str, kind: str) -> Iterator[None]:
    mistakes = (ValueError, OSError, EOFError, KeyError, TypeError, TokenError, struct.error, zipfile.BadZipFile)
    try:
        yield
    except mistakes as error:
        raise DataError(f"{place}: expected {kind}: {' '.join(str(error).split())[:200]}") from error


def _of_npy(path: Path, start: int, size: int, place: str) -> MappedArray:
    """An array that begins ``start`` bytes into a file, with its header, and takes up to ``size``."""
    with path.open("rb") as file:
        file.seek(start)
        shape, is_fortran, kind = _npy_header(file)
        offset = file.tell()
    if kind.hasobject or kind.kind not in "biufc":
        what = "objects, which would have to be unpickled" if kind.hasobject else str(kind)
        raise DataError(f"{place}: expected an array of numbers, found one of {what}")
    content = _mapped(path, kind, shape, offset, start + size, place)
    return MappedArray(content.reshape(shape, order="F" if is_fortran else "C"))


def _npy_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, "np.dtype[Any]"]:
    version = npy.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {'.'.join(map(str, version))} of the format is not of arrays of numbers")
    return (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(file)


def _mapped(path: Path, kind: Any, shape: tuple[int, ...], offset: int, end: int, place: str) -> Array:
    """The numbers of an array from a byte of a file on, in a row."""
    if not shape:
        raise DataError(f"{place}: expected an array with an entry for each sample, found a single number")
    count = math.prod(shape)
    needed, there = count * np.dtype(kind).itemsize, min(end, path.stat().st_size) - offset
    if min(shape) < 0 or there < needed:
        raise DataError(
            f"{place}: cut short: expected {needed:,} bytes of {np.dtype(kind)} {list(shape)} from byte {offset:,} on, "
            f"found {max(there, 0):,}"
        )
    if not count:
        return np.empty(0, kind)
    return np.memmap(path, kind, "r", offset, (count,)).view(np.ndarray)


def _of_npz(path: Path, place: str) -> Iterator[tuple[str, MappedArray]]:
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            where = f"{place}: {name}"
            if member.compress_type != zipfile.ZIP_STORED:
                raise DataError(f"{where}: is compressed, and cannot be memory-mapped; write it by np.savez")
            file.seek(member.header_offset)
            header = file.read(_OFFSET_OF_NAME)
            lengths = struct.unpack("<HH", header[_OFFSET_OF_NAME - 4 :])
            start = member.header_offset + _OFFSET_OF_NAME + sum(lengths)
            yield name, _of_npy(path, start, member.file_size, where)


def _of_safetensors(path: Path, place: str) -> Iterator[tuple[str, MappedArray]]:
    with path.open("rb") as file:
        [length] = struct.unpack("<Q", file.read(8))
        if length > min(_MOST_HEADER, path.stat().st_size):
            raise ValueError(f"its header would be of {length:,} bytes")
        header = json.loads(file.read(length))
    for name, told in header.items():
        if name == "__metadata__":
            continue
        where, offsets = f"{place}: {name}", told["data_offsets"]
        if told["dtype"] not in _SAFETENSORS:
            raise DataError(f"{where}: expected numbers of {', '.join(_SAFETENSORS)}, found {told['dtype']!r:.40}")
        kind, seen_as = _SAFETENSORS[told["dtype"]]
        begin, end = (8 + length + int(offset) for offset in offsets)
        content = _mapped(path, kind, tuple(told["shape"]), begin, end, where)
        yield name, MappedArray(content.reshape(told["shape"]), seen_as)
