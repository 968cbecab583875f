"""Parse IDX files, the format of MNIST, trusting nothing that a file says about itself; numpy only."""

import gzip
import io
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raytorch.datasets.file_errors import Bytes, fault, reading


@dataclass(frozen=True)
class IdxFormat:
    """Content that an IDX file of unsigned bytes has to hold: 1 to ``most`` items of shape ``item``."""

    noun: str
    item: tuple[int, ...]
    most: int

    @property
    def magic(self) -> bytes:
        """The first four bytes: zero, zero, the code of unsigned bytes, the number of dimensions."""
        return bytes([0, 0, 8, 1 + len(self.item)])

    @property
    def header_bytes(self) -> int:
        """Size of the header: the magic bytes and a big-endian integer for each dimension."""
        return 4 * (2 + len(self.item))


def check_idx(path: Path, form: IdxFormat) -> int:
    """Number of items in an IDX file, by its header; the size of a plain file is verified too. Raises DataError."""
    with reading(path, f"an IDX file of {form.noun}", OSError, EOFError, zlib.error):
        with _open(path) as stream:
            items = _read_idx_header(stream, path, form)
        size = path.stat().st_size
    expected = form.header_bytes + items * math.prod(form.item)
    if path.suffix != ".gz" and size != expected:
        raise fault(path, f"{expected:,} bytes for {items:,} {form.noun}", f"{size:,}")
    return items


def read_idx(path: Path, form: IdxFormat) -> Bytes:
    """Array (n, *form.item) of an IDX file, inflated if its name ends in .gz. Raises DataError.

    ``form`` bounds the memory: a file that inflates past what its header says is refused at the first excess byte.
    """
    items = check_idx(path, form)
    with reading(path, f"an IDX file of {form.noun}", OSError, EOFError, zlib.error), _open(path) as stream:
        stream.read(form.header_bytes)
        array = np.empty((items, *form.item), np.uint8)
        got = stream.readinto(array.data.cast("B"))
        excess = stream.read(1)  # at the end of a gzip stream this also verifies its checksum
    if got != array.nbytes or excess:
        found = f"more than {array.nbytes:,}" if excess else f"{got:,}"
        raise fault(path, f"{array.nbytes:,} bytes after the header for {items:,} {form.noun}", found)
    return array


def _open(path: Path) -> io.BufferedIOBase:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _read_idx_header(stream: io.BufferedIOBase, path: Path, form: IdxFormat) -> int:
    header = stream.read(form.header_bytes)
    if len(header) < form.header_bytes:
        raise fault(path, f"a header of {form.header_bytes} bytes", f"{len(header)}")
    if header[:4] != form.magic:
        raise fault(path, f"magic bytes {form.magic.hex()} (IDX of {form.noun})", header[:4].hex())
    items, *item = struct.unpack(f">{1 + len(form.item)}I", header[4:])
    if tuple(item) != form.item:
        raise fault(path, f"{form.noun} of shape {form.item}", f"{tuple(item)}")
    if not 1 <= items <= form.most:
        raise fault(path, f"1 to {form.most:,} {form.noun}", f"{items:,}")
    return int(items)
