"""Windows of ``context`` tokens over files of tokens, by their number: what is read of a file is one window."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from raytorch.errors import DataError
from raytorch.sources.token_files import TokenFile

Array = np.ndarray[Any, Any]

logger = logging.getLogger("raytorch")

IGNORED = -100
"""The target of padding, which ``torch.nn.functional.cross_entropy`` ignores."""
_MUCH = 0.5
"""Of what is read, the share of padding beyond which a warning says so."""
_BLOCK_BYTES = 2**20
_STRETCH = 256
"""Documents of which the windows are counted together."""
_AT_ONCE = 2**20 // _STRETCH * _STRETCH


class TokenWindows(ABC):
    """A batch is a tuple of inputs and targets, int64 (B, context): each target is the token behind its input.

    Every token but the first of a file is a target once. What is behind the last window is padding, whose targets are
    :data:`IGNORED`.
    """

    ordered = True
    """Neighbours go on from each other: a share that is held out is the end."""

    def __init__(self, files: Sequence[TokenFile], context: int, documents: Literal["packed", "apart"]) -> None:
        """Raises DataError for files of several tokenizers, or damaged ones."""
        require_one_coding(files)
        self._files, self._context = files, context
        self._cuts = [(_Packed if documents == "packed" else _Apart)(file, context) for file in files]
        self._ends = np.cumsum([cut.windows for cut in self._cuts])
        if self._padding > _MUCH:
            _warn_of_padding(files[0].place, context, round(100 * self._padding), documents)

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens."""

    def describe(self, batch: tuple[Tensor, Tensor]) -> list[dict[str, str]]:
        """The text of each sample's inputs, for ``raytorch data show``."""
        return [{"text": self.decode(tokens)} for tokens in batch[0].tolist()]

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def facts(self) -> dict[str, Any]:
        """What a model is told."""
        header = self._files[0].header
        targets = sum(file.header.tokens - 1 for file in self._files)
        return {
            "vocabulary": header.vocabulary,
            "context": self._context,
            "end_token": header.end_token,
            "tokenizer": header.tokenizer,
            "tokenizer_sha256": header.tokenizer_sha256,
            "bytes_per_token": sum(file.header.text_bytes for file in self._files) / targets,
            "padding_share": round(self._padding, 4),
        }

    @property
    def _padding(self) -> float:
        """Which share of all that is read is padding, as documents, or files, are shorter than a window."""
        return 1 - sum(file.header.tokens - 1 for file in self._files) / (len(self) * self._context)

    @property
    def blocks(self) -> Tensor:
        """How many windows lie together, in about a megabyte each of a file."""
        sizes = []
        for file, cut in zip(self._files, self._cuts, strict=True):
            parts = -(-file.header.tokens * file.tokens.itemsize // _BLOCK_BYTES)
            edges = np.arange(min(parts, cut.windows) + 1) * cut.windows // min(parts, cut.windows)
            sizes.append(np.diff(edges))
        return torch.from_numpy(np.concatenate(sizes))

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The windows of these numbers, int64 (B,). Raises DataError for a token that there cannot be."""
        numbers = indices.numpy()
        of = np.searchsorted(self._ends, numbers, "right")
        read = np.empty((len(numbers), self._context + 1), np.int64)
        lengths = np.empty(len(numbers), np.int64)
        for number in np.unique(of):
            rows, cut = np.flatnonzero(of == number), self._cuts[number]
            starts, lengths[rows] = cut.at(numbers[rows] - (self._ends[number] - cut.windows))
            read[rows] = _read(self._files[number], starts, lengths[rows], self._context)
        targets = read[:, 1:].copy()
        targets[np.arange(self._context) >= lengths[:, None]] = IGNORED
        return torch.from_numpy(read[:, :-1].copy()), torch.from_numpy(targets)


@cache
def _warn_of_padding(place: str, context: int, percent: int, documents: str) -> None:
    packed = "take documents: packed, or " if documents == "apart" else ""
    logger.warning(
        "data: %s: %d %% of what is read of it and the files beside it is padding, as what a window may hold is "
        "shorter than its %s tokens; %sset data.context to less",
        place,
        percent,
        f"{context:,}",
        packed,
    )


def require_one_coding(files: Sequence[TokenFile]) -> None:
    """Refuse files of several tokenizers. Raises DataError."""
    first, *others = files
    for other in others:
        if other.header.coding != first.header.coding:
            raise DataError(
                f"{other.place}: its tokens are those of {_named(other)}, and those of {first.place} of "
                f"{_named(first)}; write all files of a data set with one tokenizer"
            )


def _named(file: TokenFile) -> str:
    header = file.header
    sha256 = ascii(header.tokenizer_sha256[:12])[1:-1]
    return f"{ascii(header.tokenizer[:80])[1:-1]} ({header.vocabulary:,} tokens, SHA-256 {sha256})"


def _read(file: TokenFile, starts: Array, lengths: Array, context: int) -> Array:
    """Windows from ``starts`` on, with the token behind each, (B, context + 1), padded with end-of-document tokens."""
    places = starts[:, None] + np.arange(context + 1)
    is_padding = np.arange(context + 1) > lengths[:, None]
    read: Array = file.tokens[np.where(is_padding, 0, places)].astype(np.int64)
    header = file.header
    if read.size and read.max() >= header.vocabulary:
        row, column = np.argwhere(read >= header.vocabulary)[0]
        place = places[row, column]
        document = int(np.searchsorted(file.ends, place))
        raise DataError(
            f"{file.place}: token {place:,}, of document {document:,}, is {read[row, column]:,}, and the vocabulary "
            f"has {header.vocabulary:,}; write the file anew"
        )
    read[is_padding] = header.end_token
    return read


class _Packed:
    """Windows over all documents of a file in a row."""

    def __init__(self, file: TokenFile, context: int) -> None:
        self._targets, self._context = file.header.tokens - 1, context
        self.windows = -(-self._targets // context)

    def at(self, numbers: Array) -> tuple[Array, Array]:
        """Where windows begin, and how many targets they have, int64 (B,) each."""
        starts = numbers * self._context
        return starts, np.minimum(self._context, self._targets - starts)


class _Apart:
    """Windows of which each is of one document.

    How many windows there are before a document is kept for each :data:`_STRETCH` of them alone.
    """

    def __init__(self, file: TokenFile, context: int) -> None:
        self._file, self._context = file, context
        counts = [self._counted(start) for start in range(0, file.header.documents, _AT_ONCE)]
        self._before = np.concatenate([[0], np.concatenate(counts).cumsum()])
        self.windows = int(self._before[-1])

    def at(self, numbers: Array) -> tuple[Array, Array]:
        """See :meth:`_Packed.at`."""
        places = [self._place(number) for number in numbers]
        return np.array([start for start, _ in places]), np.array([length for _, length in places])

    def _place(self, number: int) -> tuple[int, int]:
        stretch = int(np.searchsorted(self._before, number, "right")) - 1
        ends = self._file.ends[stretch * _STRETCH : (stretch + 1) * _STRETCH + 1]
        behind = self._windows(ends).cumsum()
        within = number - int(self._before[stretch])
        document = int(np.searchsorted(behind, within, "right"))
        start = int(ends[document]) + (within - (int(behind[document - 1]) if document else 0)) * self._context
        return start, min(self._context, int(ends[document + 1]) - start)

    def _counted(self, start: int) -> Array:
        """The windows of each stretch of the documents from ``start`` on."""
        ends, header = self._file.ends[start : start + _AT_ONCE + 1], self._file.header
        is_first, is_last = start == 0, start + _AT_ONCE >= header.documents
        in_order = bool((np.diff(ends) > 0).all()) and (not is_first or ends[0] == 0)
        if not in_order or (is_last and ends[-1] != header.tokens - 1):
            raise DataError(f"{self._file.place}: where its documents end is damaged; write the file anew")
        windows = self._windows(ends)
        return np.add.reduceat(windows, np.arange(0, len(windows), _STRETCH))

    def _windows(self, ends: Array) -> Array:
        """How many each document has."""
        return -(-np.diff(ends) // self._context)
