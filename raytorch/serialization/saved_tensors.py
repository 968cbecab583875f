"""Reading tensors that are in files, in one piece or in several, as a whole or the parts that somebody needs."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from raytorch.errors import ModelFileError
from raytorch.serialization.file_kinds import DTYPE_NAMES, FileKind, are_sizes, described_tensors, read_header, require
from raytorch.serialization.pieces import BLOCK, PIECES_KEY, blocks, bytes_of, checksums, counted, piece_paths
from raytorch.system.regular_files import RegularFile, open_regular

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class Bytes(Protocol):
    """A file that is read from anywhere."""

    size: int

    def read_into(self, place: int, memory: memoryview) -> None:
        """Fill ``memory`` with what begins at byte ``place``. Raises EOFError where the file has less."""


@dataclass(frozen=True)
class _Stored:
    """A piece in a file."""

    file: "PieceFile"
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    own_shape: tuple[int, ...]
    place: int
    """Where it begins in the file."""
    sums: str | None

    @property
    def ends(self) -> tuple[int, ...]:
        return tuple(begin + size for begin, size in zip(self.offsets, self.own_shape, strict=True))

    def rows(self, begin: int, end: int) -> Tensor:
        """Some of its rows; of a number without a dimension it has one."""
        row = prod(self.own_shape[1:]) * self.dtype.itemsize
        first, last = begin * row, end * row
        nbytes = prod(self.own_shape) * self.dtype.itemsize
        if self.sums is not None:
            first -= first % BLOCK
            last = min(-(-last // BLOCK) * BLOCK, nbytes)
        memory = torch.empty(last - first, dtype=torch.uint8, device="cpu")
        self.file.fill(memory, self, first)
        own = memory[begin * row - first : end * row - first]
        if len(own) != len(memory):  # which would be held, and products differ in their last bits at odd addresses
            own = own.clone()
        return own.view(self.dtype).view(end - begin, *self.own_shape[1:])


class PieceFile:
    """One file with pieces.

    Args:
        path: The file, as errors name it.
        content: It, open.

    Raises ModelFileError where its header is damaged, or lies.
    """

    def __init__(self, path: Path, content: Bytes) -> None:
        self.path, self._content = path, content
        self.bytes_read = 0
        place = 0

        def read(count: int) -> bytes:
            nonlocal place
            memory = bytearray(min(count, content.size - place))
            self._read(place, memoryview(memory))
            place += len(memory)
            return bytes(memory)

        self.head = read_header(path, content.size, read)
        header = described_tensors(path, self.head, content.size)
        self.metadata: dict[str, Any] = header.pop("__metadata__", {})
        self.save, described = self._pieces()
        self.stored = [self._stored(name, entry, described) for name, entry in header.items()]

    def fill(self, memory: Tensor, stored: _Stored, first: int) -> None:
        """Fill ``memory`` with bytes of a piece from ``first`` on, which begin and end with blocks."""
        view = bytes_of(memory)
        self._read(stored.place + first, view)
        if stored.sums is not None:
            begin = first // BLOCK * 8
            if stored.sums[begin : begin + 8 * blocks(len(view))] != checksums(view):
                raise self._damaged(f"tensor {stored.name!r:.99} has not the content that its checksum is of")

    def _read(self, place: int, memory: memoryview) -> None:
        try:
            self._content.read_into(place, memory)
        except EOFError:
            raise self._damaged("it ends before its time") from None
        self.bytes_read += len(memory)

    def _pieces(self) -> tuple[str, dict[str, Any] | None]:
        if (text := self.metadata.get(PIECES_KEY)) is None:
            return "", None
        try:
            pieces = json.loads(text)
            save, tensors = pieces["save"], pieces["tensors"]
        except (ValueError, TypeError, KeyError, RecursionError):
            save, tensors = None, None
        if not (isinstance(save, str) and isinstance(tensors, dict)):
            raise self._damaged("what it says of its pieces is no such JSON")
        return save, tensors

    def _stored(self, name: str, entry: Mapping[str, Any], described: Mapping[str, Any] | None) -> _Stored:
        if entry["dtype"] not in _DTYPES:
            raise self._damaged(f"tensor {name!r:.99} is of dtype {entry['dtype']!r:.20}, which PyTorch lacks")
        own, dtype = tuple(entry["shape"]), _DTYPES[entry["dtype"]]
        place = len(self.head) + entry["data_offsets"][0]
        if described is None:
            return _Stored(self, name, dtype, own, (0,) * len(own), own, place, None)
        try:
            shape, offsets, sums = (described[name][key] for key in ("shape", "offsets", "crc32"))
            is_within = _are_sizes(shape, len(own)) and _are_sizes(offsets, len(own))
            is_within = is_within and all(b + n <= all_ for b, n, all_ in zip(offsets, own, shape, strict=True))
            is_summed = isinstance(sums, str) and len(sums) == 8 * blocks(prod(own) * dtype.itemsize)
        except (KeyError, TypeError):
            is_within = is_summed = False
        if not (is_within and is_summed):
            raise self._damaged(f"it does not say of which part tensor {name!r:.99} is, or lies")
        return _Stored(self, name, dtype, tuple(shape), tuple(offsets), own, place, sums)

    def _damaged(self, found: str) -> ModelFileError:
        return ModelFileError(f"{self.path} is damaged: {found}; write it again, or fetch it again")


def _are_sizes(numbers: Any, count: int) -> bool:
    is_list = isinstance(numbers, list) and len(numbers) == count
    return is_list and are_sizes(numbers) and prod(filter(None, numbers)) < 2**60


class SavedTensor:
    """A tensor in files, which is read as a whole or in parts."""

    def __init__(self, name: str, stored: Sequence[_Stored]) -> None:
        self.name, self._stored = name, stored
        self.shape, self.dtype = torch.Size(stored[0].shape), stored[0].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the whole."""
        return prod(self.shape) * self.dtype.itemsize

    def read(self, offsets: Sequence[int] | None = None, sizes: Sequence[int] | None = None) -> Tensor:
        """The part of ``sizes`` that begins at ``offsets``, or all of it, on the CPU and new each time.

        Raises ModelFileError where its bytes are damaged.
        """
        begins = tuple(offsets or (0,) * len(self.shape))
        shape = tuple(self.shape if sizes is None else sizes)
        if len(self._stored) == 1 and (begins, shape) == (self._stored[0].offsets, self._stored[0].own_shape):
            return self._stored[0].rows(0, shape[0] if shape else 1).view(shape)
        made = torch.empty(shape, dtype=self.dtype, device="cpu")
        for stored in self._stored:
            self._copy(stored, begins, made)
        return made

    def _copy(self, stored: _Stored, begins: tuple[int, ...], made: Tensor) -> None:
        """Copy what a piece and the part that is read have in common."""
        if not made.dim():
            made.copy_(stored.rows(0, 1).view(()))
            return
        low = [max(pair) for pair in zip(begins, stored.offsets, strict=True)]
        high = [min(b + n, end) for b, n, end in zip(begins, made.shape, stored.ends, strict=True)]
        if all(first < last for first, last in zip(low, high, strict=True)):
            there = stored.rows(low[0] - stored.offsets[0], high[0] - stored.offsets[0])
            inner = [slice(a - b, c - b) for a, b, c in zip(low, stored.offsets, high, strict=True)][1:]
            target = tuple(slice(a - b, c - b) for a, b, c in zip(low, begins, high, strict=True))
            made[target] = there[(slice(None), *inner)]


class SavedTensors(Mapping[str, SavedTensor]):
    """The tensors of files that belong together, by name.

    Raises ModelFileError where a piece is missing, is there twice, or is of something else.
    """

    def __init__(self, files: Iterable[PieceFile]) -> None:
        self.files = list(files)
        first = self.files[0]
        parts: dict[str, list[_Stored]] = {}
        for file in self.files:
            if file.save != first.save:
                raise ModelFileError(
                    f"{file.path} is of another save than {first.path}; fetch both again, from the same place"
                )
            for stored in file.stored:
                parts.setdefault(stored.name, []).append(stored)
        for stored_parts in parts.values():
            _require_one_whole(stored_parts)
        self._tensors = {name: SavedTensor(name, stored) for name, stored in parts.items()}

    @property
    def bytes_read(self) -> int:
        """Bytes that were read from the files until now."""
        return sum(file.bytes_read for file in self.files)

    def __getitem__(self, name: str) -> SavedTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@contextmanager
def open_tensors(path: Path) -> Iterator[SavedTensors]:
    """The tensors of a safetensors file, or of its pieces, to be read in the block.

    Raises ModelFileError: a file is missing, damaged, or of another format.
    """
    with ExitStack() as held:
        files = []
        for each in (paths := piece_paths(path)):
            require(each, FileKind.SAFETENSORS)
            file = RegularFile(open_regular(each))
            held.callback(file.close)
            files.append(PieceFile(each, file))
        if paths != [path]:
            _require_all(path, files)
        yield SavedTensors(files)


def _require_all(path: Path, files: list[PieceFile]) -> None:
    """Refuse files of which one is missing, as far as their names tell; of pieces a process may have written none."""
    numbers = [counted(file.path) for file in files]
    of = numbers[0][1]
    is_complete = numbers[0][0] == 1 and (files[0].save or len(files) == of)
    if any(other != of for _, other in numbers) or not is_complete:
        raise ModelFileError(
            f"{path} is in several files, and of {', '.join(file.path.name for file in files)[:300]} not all are "
            "there, or some are of another; fetch all that belong together"
        )


def _require_one_whole(parts: list[_Stored]) -> None:
    """Refuse pieces that do not make one tensor together."""
    first = parts[0]
    for each in parts:
        if (each.shape, each.dtype) != (first.shape, first.dtype):
            raise ModelFileError(
                f"{each.file.path}: tensor {each.name!r:.99} is of {each.dtype} and shape {list(each.shape)}, not of "
                f"{first.dtype} and {list(first.shape)} as in {first.file.path}; fetch both again, from the same place"
            )
    under_way: list[_Stored] = []
    for each in sorted(parts, key=lambda part: part.offsets):
        if each.shape:
            under_way = [other for other in under_way if other.ends[0] > each.offsets[0]]
        if any(_overlap(each, other) for other in under_way):
            raise ModelFileError(
                f"{each.file.path}: a part of tensor {each.name!r:.99} is in another file as well; fetch all again, "
                "from the same place"
            )
        under_way.append(each)
    there = sum(prod(part.own_shape) for part in parts)
    if there != prod(first.shape):
        raise ModelFileError(
            f"{first.file.path}: of tensor {first.name!r:.99} there are {there:,} of {prod(first.shape):,} elements, "
            "and the file with the others is missing; fetch all again"
        )


def _overlap(one: _Stored, other: _Stored) -> bool:
    spans = zip(one.offsets, one.ends, other.offsets, other.ends, strict=True)
    return all(max(a, c) < min(b, d) for a, b, c, d in spans)
