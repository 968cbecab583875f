"""The documents of text files, read a piece at a time. Imports no torch."""

import codecs
import io
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, Literal, Protocol

from raytorch.errors import DataError
from raytorch.sources.files import File, Root

DocumentPer = Literal["file", "line", "paragraph"]
SUFFIXES = (".txt", ".jsonl")
PIECE = 2**20
"""Characters after which a document is cut, at the end of a line if it has one."""
LONGEST_LINE = 2**28
"""Bytes of a line of JSON."""
_SEPARATORS = {"file": None, "line": re.compile(r"\r?\n"), "paragraph": re.compile(r"\r?\n(?:[ \t]*\r?\n)+")}

Piece = tuple[str, bool]
"""Some text of a document, and whether the document ends with it."""


class Documents(Protocol):
    """Some documents."""

    @property
    def position(self) -> int:
        """Bytes that have been read."""

    def pieces(self) -> Iterator[Piece]:
        """The documents, one after the other. Raises DataError."""


class TextFile:
    """A file of text: of JSON, a document in each line, if its name ends in ``.jsonl``."""

    def __init__(self, root: Root, file: File, *, document_per: DocumentPer = "file", key: str = "text") -> None:
        self._stream = _Stream(root, file)
        self._place, self._key = root.place(file.name), key
        self._separator = _SEPARATORS[document_per]
        self._is_json = file.name.lower().endswith(".jsonl")

    @property
    def position(self) -> int:
        """Bytes that have been read."""
        return self._stream.position

    def pieces(self) -> Iterator[Piece]:
        """The documents, in pieces. Raises DataError for what is no text, with its place."""
        buffered: Any = io.BufferedReader(self._stream, PIECE)
        if not self._is_json:
            yield from _cut(self._decoded(buffered), self._separator)
            return
        for text in self._texts(buffered):
            yield from _cut(iter([text]), None)

    def _decoded(self, stream: BinaryIO) -> Iterator[str]:
        decoder, start = codecs.getincrementaldecoder("utf-8")(), 0
        while True:
            content = stream.read(PIECE)
            before = len(decoder.getstate()[0])
            try:
                text = decoder.decode(content, final=not content)
            except UnicodeDecodeError as error:
                raise self._no_utf_8(error, start - before) from error
            yield text.removeprefix("\ufeff") if start == 0 else text
            if not content:
                return
            start += len(content)

    def _texts(self, stream: BinaryIO) -> Iterator[str]:
        start = 0
        number = 0
        while line := stream.readline(LONGEST_LINE):
            number += 1
            if len(line) == LONGEST_LINE:
                raise DataError(f"{self._place}, line {number:,}: is of {LONGEST_LINE:,} bytes and more")
            try:
                text = line.decode().removeprefix("\ufeff")
            except UnicodeDecodeError as error:
                raise self._no_utf_8(error, start) from error
            if text.strip():
                yield self._text(text, number)
            start += len(line)

    def _text(self, line: str, number: int) -> str:
        expected = f"{self._place}, line {number:,}: expected a JSON object with a text as {self._key!r}"
        try:
            content: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{expected}, found what is no JSON: {error!s:.100}") from error
        text = content.get(self._key) if isinstance(content, dict) else None
        if not isinstance(text, str):
            keys = ", ".join(map(repr, list(content)[:9])) if isinstance(content, dict) else type(content).__name__
            found = f"{type(text).__name__} there" if text is not None else keys or "an empty one"
            raise DataError(f"{expected}, found {found}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{expected}, found half a character in it, {text[error.start]!a}") from error
        return text

    def _no_utf_8(self, error: UnicodeDecodeError, start: int) -> DataError:
        found = error.object[error.start : error.start + 1].hex()
        return DataError(
            f"{self._place}, byte {start + error.start:,}: expected text in UTF-8, found 0x{found} ({error.reason}); "
            "convert the file, with iconv, say"
        )


class _Stream(io.RawIOBase):
    """The bytes of a file below a root."""

    def __init__(self, root: Root, file: File) -> None:
        self._root, self._file = root, file
        self.position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), self._file.size - self.position)
        content = self._root.read(self._file.name, self.position, size) if size else b""
        buffer[: len(content)] = content
        self.position += len(content)
        return len(content)


def _cut(chunks: Iterator[str], separator: re.Pattern[str] | None) -> Iterator[Piece]:
    """Documents, by what stands between them, in pieces; those that are empty, or blank, have an empty one."""
    rest, is_begun = "", False
    for chunk in chunks:
        rest += chunk
        text = rest.rstrip() if separator else rest  # what is between documents may go on in the next chunk
        text = rest if len(rest) > len(text) + PIECE else text
        space = rest[len(text) :]
        if separator:
            *documents, text = separator.split(text)
            for document in documents:
                yield document if is_begun or document.strip() else "", True
                is_begun = False
            text = text if is_begun or text.strip() else ""
        while len(text) > PIECE:
            end = _end_of_piece(text)
            yield text[:end], False
            text, is_begun = text[end:], True
        rest = text + space
    for document in separator.split(rest) if separator else [rest]:
        yield document if is_begun or document.strip() or not separator else "", True
        is_begun = False


def _end_of_piece(text: str) -> int:
    """Where to cut a text that is too long: behind a line, else behind a word, else anywhere."""
    line, word = text.rfind("\n", 0, PIECE) + 1, text.rfind(" ", 1, PIECE)
    return line or (word if word > 0 else PIECE)
