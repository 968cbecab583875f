"""The files in a tar archive and where they begin, from its headers alone. Nothing is unpacked."""

import os
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from raytorch.errors import DataError

BLOCK = 512
_FILES = (b"0", b"\0", b"7")
_WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")
"""Links, devices, folders and pipes, whatever size their headers name."""
_ZEROS = 1 << 20
"""Bytes of a stretch of zeros that are read at once."""
_LONG_NAME, _EXTENDED, _SPARSE = b"L", b"x", b"S"
_MOST_OF_A_NAME = 1 << 16
"""Bytes of a header that has a name, or more of what is said of the next file."""


class Member(NamedTuple):
    """A file in an archive."""

    name: str
    offset: int
    """Of its content, in bytes from the archive's start; its header is the block before that."""
    size: int
    check: int
    """The CRC-32 of its header."""


def members(archive: BinaryIO, place: str) -> Iterator[Member]:
    """The files of an archive, which messages call ``place``, without folders, links and devices.

    Archives may follow each other, as by ``cat a.tar b.tar``, and the end of the last may lack its blocks of zeros.
    Raises DataError for what is no tar archive, or is cut short.

    Example:
        >>> with open("train-000.tar", "rb") as archive:
        ...     print(next(members(archive, "train-000.tar")))
        Member(name='000001.jpg', offset=512, size=8213, check=2749183542)
    """
    end = archive.seek(0, os.SEEK_END)
    said: dict[str, str] = {}
    start = 0
    while start < max(end, 1):
        header = _read(archive, start, BLOCK, end, place)
        if not any(header):
            start = _behind_zeros(archive, start, end)
            continue
        kind, size = header[156:157], _size(header, place, start)
        if kind in (_LONG_NAME, _EXTENDED):
            said |= _more(kind, _named(archive, start, size, end, place))
            start += BLOCK + _padded(size)
            continue
        size = _whole(said["size"], place, start) if "size" in said else size
        if kind in _WITHOUT_CONTENT:
            size = 0
        if start + BLOCK + size > end:
            raise _cut_short(place, start + BLOCK, size, end)
        if kind == _SPARSE or any(key.startswith("GNU.sparse") for key in said):
            raise DataError(f"{place}: byte {start:,}: expected whole files, found a sparse one; make it without them")
        if kind in _FILES:
            yield Member(said.get("path") or _name(header), start + BLOCK, size, zlib.crc32(header))
        said = {}
        start += BLOCK + _padded(size)


def _behind_zeros(archive: BinaryIO, start: int, end: int) -> int:
    """Where blocks of zeros, which are the end of an archive, are followed by another archive; or the file's end."""
    while start < end:
        archive.seek(start)
        zeros = archive.read(_ZEROS)
        if not zeros:
            break
        if left := len(zeros.lstrip(b"\0")):
            return start + (len(zeros) - left) // BLOCK * BLOCK
        start += len(zeros)
    return end


def _name(header: bytes) -> str:
    """The name in a header, of up to 255 bytes."""
    name, prefix = _text(header[:100]), _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _size(header: bytes, place: str, start: int) -> int:
    """The size in a header, which begins at byte ``start``. Raises DataError for what is no header."""
    spaces = header[:148] + b" " * 8 + header[156:]
    if sum(spaces) != _octal(header[148:156]):
        what = (
            "; unpack it, as shards are read by position" if header.startswith((b"\x1f\x8b", b"BZh", b"\xfd7z")) else ""
        )
        raise DataError(f"{place}: byte {start:,}: expected a header of a tar archive, found none{what}")
    number = header[124:136]
    if number[0] & 0x80:  # of GNU tar, for what octal digits have no room for
        size = int.from_bytes(number, "big", signed=True) + (1 << 95 if number[0] == 0x80 else 0)
    else:
        size = _octal(number)
    if size < 0:
        raise DataError(f"{place}: byte {start:,}: expected the size of a file, found {number!r}")
    return size


def _named(archive: BinaryIO, start: int, size: int, end: int, place: str) -> bytes:
    if size > _MOST_OF_A_NAME:
        raise DataError(
            f"{place}: byte {start:,}: expected at most {_MOST_OF_A_NAME:,} bytes of a name, found {size:,}"
        )
    return _read(archive, start + BLOCK, size, end, place)


def _more(kind: bytes, content: bytes) -> dict[str, str]:
    """What a header says of the next file: its name, or records of ``LENGTH KEY=VALUE``."""
    if kind == _LONG_NAME:
        return {"path": _text(content)}
    said = {}
    while content:
        digits, _, _ = content.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        if not len(digits) + 1 < length <= len(content):
            break
        key, _, value = content[len(digits) + 1 : length].removesuffix(b"\n").partition(b"=")
        said[_text(key)] = _text(value)
        content = content[length:]
    return said


def _read(archive: BinaryIO, start: int, size: int, end: int, place: str) -> bytes:
    if start + size > end:
        raise _cut_short(place, start, size, end)
    archive.seek(start)
    content = archive.read(size)
    if len(content) < size:
        raise _cut_short(place, start, size, start + len(content))
    return content


def _cut_short(place: str, start: int, size: int, end: int) -> DataError:
    return DataError(f"{place}: cut short: expected {size:,} bytes from byte {start:,} on, and it ends at {end:,}")


def _whole(text: str, place: str, start: int) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 19:
        raise DataError(f"{place}: byte {start:,}: expected the size of a file, found {text!r:.40}")
    return int(text)


def _octal(digits: bytes) -> int:
    try:
        return int(digits.strip(b" \0") or b"0", 8)
    except ValueError:
        return -1


def _text(content: bytes) -> str:
    return content.partition(b"\0")[0].decode("utf-8", "replace")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
