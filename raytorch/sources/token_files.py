"""Files of tokens: a header, the tokens of all documents in a row, and where each document ends. Imports no torch.

A file is :data:`HEADER_BYTES` of header, :data:`MAGIC` and JSON that is padded with spaces; the tokens, little-endian,
padded with zeros to a multiple of 8 bytes; and the ends, int64. The first token is an end-of-document token, and so is
the one behind each document: the ends are the places of them all, one more than there are documents.
"""

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from raytorch.errors import DataError
from raytorch.sources.files import File, Root
from raytorch.sources.tokenizer import Tokenizer
from raytorch.system.regular_files import open_regular

Array = np.ndarray[Any, Any]

MAGIC = b"raytorch tokens\n"
VERSION = 1
HEADER_BYTES = 4_096
SUFFIX = ".tokens"
_DTYPES = {"uint8": 2**8, "uint16": 2**16, "uint32": 2**32}
"""With how many tokens each can tell apart."""
_END_BYTES = 8
_AT_ONCE = 2**20


@dataclass(frozen=True)
class Header:
    """What a file says of its tokens."""

    dtype: str
    tokens: int
    """With the end-of-document tokens."""
    documents: int
    text_bytes: int
    """Of the text in UTF-8."""
    vocabulary: int
    """One more than the largest token there may be."""
    end_token: int
    tokenizer: str
    """Its name."""
    tokenizer_sha256: str

    @property
    def coding(self) -> tuple[str, int, int]:
        """What files have to agree in to be of one data set."""
        return self.tokenizer_sha256, self.vocabulary, self.end_token

    @property
    def ends_at(self) -> int:
        """The byte that the ends of documents begin at."""
        content = self.tokens * np.dtype(self.dtype).itemsize
        return HEADER_BYTES + content + -content % _END_BYTES

    @property
    def file_bytes(self) -> int:
        """The size of the file."""
        return self.ends_at + _END_BYTES * (self.documents + 1)


class TokenFile:
    """A file of tokens, memory-mapped when it is first read."""

    def __init__(self, root: Root, file: File) -> None:
        """Raises DataError if it is none, or not whole."""
        self._root, self._name = root, file.name
        self.place = root.place(file.name)
        self.header = _parsed(root.read(file.name, 0, min(file.size, HEADER_BYTES)), file.size, self.place)
        self._mapped: tuple[Array, Array] | None = None

    @property
    def tokens(self) -> Array:
        """All tokens, (M,)."""
        return self._arrays()[0]

    @property
    def ends(self) -> Array:
        """Where the end-of-document tokens are, int64 (D + 1,)."""
        return self._arrays()[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_mapped": None}

    def _arrays(self) -> tuple[Array, Array]:
        if self._mapped is None:
            header, path = self.header, self._root.local(self._name)
            try:
                tokens = np.memmap(path, f"<u{np.dtype(header.dtype).itemsize}", "r", HEADER_BYTES, header.tokens)
                ends = np.memmap(path, "<i8", "r", header.ends_at, header.documents + 1)
            except (OSError, ValueError) as error:
                raise DataError(f"{self.place}: cannot be mapped: {error}") from error
            self._mapped = np.asarray(tokens), np.asarray(ends)
        return self._mapped


class TokenWriter:
    """Writes a file of tokens, which has its name when it is complete.

    Example:
        >>> with TokenWriter(Path("train.tokens"), tokenizer) as writer:
        ...     writer.add(*tokenizer.encode(["a document"]), text_bytes=10)
        ...     writer.end_document()
    """

    def __init__(self, path: Path, tokenizer: Tokenizer) -> None:
        self._path, self._tokenizer = path, tokenizer
        self._dtype = next(name for name, most in _DTYPES.items() if tokenizer.vocabulary <= most)
        self._tokens = self._documents = self._text_bytes = 0
        self._parts = [path.with_name(f".{path.name}.{part}") for part in ("part", "ends")]
        with ExitStack() as stack:  # which does all that it is told, whichever of it fails, as on a disk that is full
            self._file, self._ends = (self._created(part, stack) for part in self._parts)
            self._file.write(bytes(HEADER_BYTES))
            self._write_end()
            self._left_over = stack.pop_all()

    def add(self, tokens: Array, text_bytes: int) -> None:
        """Go on with a document, by the tokens of a text of so many bytes."""
        self._file.write(tokens.astype(f"<u{np.dtype(self._dtype).itemsize}").tobytes())
        self._tokens += len(tokens)
        self._text_bytes += text_bytes

    def end_document(self) -> None:
        """End a document."""
        self._documents += 1
        self._write_end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._left_over:
            if kind is None:
                self._complete()
                self._parts[0].replace(self._path)

    @property
    def header(self) -> Header:
        """What has been written so far."""
        tokenizer = self._tokenizer
        return Header(
            dtype=self._dtype,
            tokens=self._tokens,
            documents=self._documents,
            text_bytes=self._text_bytes,
            vocabulary=tokenizer.vocabulary,
            end_token=tokenizer.end_token,
            tokenizer=tokenizer.name,
            tokenizer_sha256=tokenizer.sha256,
        )

    @staticmethod
    def _created(part: Path, stack: ExitStack) -> BinaryIO:
        """A file that is gone when the stack ends."""
        file = _created(part)
        stack.callback(part.unlink, missing_ok=True)
        return stack.enter_context(file)

    def _write_end(self) -> None:
        self._ends.write(self._tokens.to_bytes(_END_BYTES, "little"))
        self.add(np.array([self._tokenizer.end_token]), 0)

    def _complete(self) -> None:
        header = self.header
        self._file.write(bytes(header.ends_at - self._file.tell()))
        self._ends.seek(0)
        shutil.copyfileobj(self._ends, self._file, _AT_ONCE)
        self._file.seek(0)
        self._file.write((MAGIC + json.dumps({"version": VERSION, **asdict(header)}).encode()).ljust(HEADER_BYTES))
        self._file.flush()
        os.fsync(self._file.fileno())


def _created(path: Path) -> BinaryIO:
    path.unlink(missing_ok=True)  # of one that was killed
    return os.fdopen(open_regular(path, os.O_RDWR | os.O_CREAT | os.O_EXCL), "w+b", _AT_ONCE)


def _parsed(content: bytes, size: int, place: str) -> Header:
    """The header of a file of so many bytes. Raises DataError for one that the file does not bear out."""
    if not content.startswith(MAGIC) or len(content) < HEADER_BYTES:
        raise DataError(f"{place}: expected a file of tokens, as raytorch data tokenize writes them, found another")
    try:
        told = json.loads(content[len(MAGIC) :])
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, Mapping):
        raise DataError(f"{place}: the header is damaged; write the file anew")
    if told.get("version") != VERSION:
        raise DataError(
            f"{place}: is of version {told.get('version')!r:.20}, and this raytorch reads {VERSION}; write it anew"
        )
    header = _checked(told)
    if header is None:
        raise DataError(f"{place}: the header is damaged; write the file anew")
    if header.file_bytes != size:
        raise DataError(
            f"{place}: expected {header.file_bytes:,} bytes for {header.tokens:,} tokens of {header.documents:,} "
            f"documents, found {size:,}; copy or write it anew"
        )
    return header


def _checked(told: Mapping[str, Any]) -> Header | None:
    """The header of what is told; None if that cannot be."""
    kinds = Header.__annotations__
    given = {name: told.get(name) for name in kinds}
    if any(type(value) is not kinds[name] for name, value in given.items()) or given["dtype"] not in _DTYPES:
        return None
    header = Header(**given)  # type: ignore[arg-type] # each is of its kind
    numbers = header.tokens, header.documents, header.text_bytes, header.end_token
    is_possible = all(0 <= number < 2**62 for number in numbers) and header.end_token < header.vocabulary
    fits = header.vocabulary <= _DTYPES[header.dtype] and header.tokens > header.documents
    return header if is_possible and fits and header.documents else None
