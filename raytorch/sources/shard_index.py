"""The index of a tar shard, a file beside it: which samples are in it, and where their files begin.

It is a line with a checksum and what that is of, a parquet file.

A row has a sample's key, the extensions of its files, where they are, and its class where it has a file ``cls``.
"""

import fcntl
import io
import os
import re
import secrets
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute
from pyarrow import parquet

from raytorch.errors import DataError
from raytorch.sources.tar_headers import BLOCK, Member, members
from raytorch.system.regular_files import open_regular

SUFFIX = ".index"
"""Behind the name of the shard."""
_FIRST_LINE = b"raytorch shard index 2 %08x\n"
_FIRST = len(_FIRST_LINE % 0)
_MOST_OF_A_CLASS = 20
_SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "extensions": pa.list_(pa.string()),
        "offsets": pa.list_(pa.int64()),
        "sizes": pa.list_(pa.int64()),
        "checks": pa.list_(pa.int64()),
        "cls": pa.int64(),
    }
)
_NUMBERS = ("offsets", "sizes", "checks")
Numbers = np.ndarray[Any, np.dtype[np.int64]]


class Sample(NamedTuple):
    """A sample of a shard."""

    key: str
    files: dict[str, Member]
    """By their extensions."""


class Placed(NamedTuple):
    """The samples of a shard, as its index has them."""

    keys: list[str]
    offsets: Numbers
    """Of the content of each field of each sample (N, F); 0 where a sample lacks it."""
    sizes: Numbers
    checks: Numbers
    """The CRC-32 of the files' headers."""
    classes: Numbers
    """Of each sample; -1 where it has none."""


def write_index(shard: Path) -> int:
    """Write the index of a shard and return how many samples it has. Raises DataError for one that is not in order.

    The index has its name when it is complete.

    Example:
        >>> write_index(Path("train-000.tar"))
        10000
    """
    columns: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
    try:
        with os.fdopen(open_regular(shard), "rb") as archive:
            for sample in samples(members(archive, str(shard)), str(shard)):
                columns["key"].append(sample.key)
                columns["extensions"].append(list(sample.files))
                for name in _NUMBERS:
                    columns[name].append([getattr(file, name.removesuffix("s")) for file in sample.files.values()])
                columns["cls"].append(_class_of(archive, sample))
            size = archive.seek(0, os.SEEK_END)
        table = pa.table(columns, _SCHEMA.with_metadata({b"size": str(size)}))
        parquet.write_table(table, written := io.BytesIO(), compression="zstd")
        with _new_file(shard, shard.with_name(shard.name + SUFFIX)) as file:
            file.write(_FIRST_LINE % zlib.crc32(written.getvalue()))
            file.write(written.getvalue())
    except OSError as error:
        raise DataError(f"{shard}: cannot be indexed: {error.strerror or error}") from error
    return len(table)


@contextmanager
def _new_file(shard: Path, name: Path) -> Iterator[BinaryIO]:
    """A file that has its ``name`` when it is complete. It is locked until then: those that are not were left behind
    by processes that were killed, and are removed.
    """
    for left in shard.parent.iterdir():
        if re.fullmatch(rf"\.{re.escape(shard.name)}-[0-9a-f]{{16}}", left.name):
            with suppress(OSError), left.open("rb") as old:
                fcntl.flock(old, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()
    part, file = _locked_file(shard)
    try:
        with file:
            yield file
            file.flush()
            part.replace(name)
    finally:
        part.unlink(missing_ok=True)


def _locked_file(shard: Path) -> tuple[Path, BinaryIO]:
    while True:
        part = shard.with_name(f".{shard.name}-{secrets.token_hex(8)}")
        file = part.open("xb")
        with suppress(OSError):  # where the file system has no locks, nothing is removed either
            fcntl.flock(file, fcntl.LOCK_EX)
        if part.exists():  # and was not taken for one that is left, before it was locked
            return part, file
        file.close()


def samples(found: Iterator[Member], place: str) -> Iterator[Sample]:
    """The samples of an archive's files: the key of a file is its path up to the first dot of its name.

    Files without a dot, or with nothing in front of one, are of no sample. Raises DataError for a key that comes again.
    """
    known: set[str] = set()
    sample = Sample("", {})
    for file in found:
        folder, slash, name = file.name.rpartition("/")
        stem, dot, extension = name.partition(".")
        if not stem or not dot:
            continue
        key, extension = f"{folder}{slash}{stem}", extension.lower()
        if key != sample.key:
            if sample.files:
                yield sample
            if key in known:
                raise DataError(f"{place}: expected the files of {key} to lie together, found {file.name} elsewhere")
            known.add(key)
            sample = Sample(key, {})
        if extension in sample.files:
            raise DataError(f"{place}: expected one file {file.name}, found another")
        sample.files[extension] = file
    if sample.files:
        yield sample


def _class_of(archive: io.BufferedIOBase, sample: Sample) -> int | None:
    file = sample.files.get("cls")
    if file is None or file.size > _MOST_OF_A_CLASS:
        return None
    archive.seek(file.offset)
    text = archive.read(file.size).strip()
    return int(text) if text.isdigit() and int(text) < 1 << 62 else None


def read_index(content: bytes, size: int, fields: list[str], place: str) -> Placed:
    """What an index says of some fields of a shard of that ``size``, which messages call ``place``.

    Raises DataError for an index of another shard, or of the one that was there before.
    """
    advice = f"write it anew: raytorch data index {place}"
    if content[:_FIRST] != _FIRST_LINE % zlib.crc32(content[_FIRST:]):
        what = "found it damaged" if content.startswith(_FIRST_LINE[:23]) else "found another file"
        raise DataError(f"{place}{SUFFIX}: expected an index of a shard, {what}; {advice}")
    try:
        table = parquet.read_table(io.BytesIO(content[_FIRST:]))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{place}{SUFFIX}: expected an index of a shard: {error}; {advice}") from error
    if table.schema.names != _SCHEMA.names or table.schema.types != _SCHEMA.types:
        raise DataError(f"{place}{SUFFIX}: expected an index of a shard, found another table; {advice}")
    told = table.schema.metadata or {}
    if told.get(b"size") != str(size).encode():
        indexed = told.get(b"size", b"?").decode()
        raise DataError(f"{place}: its index is of another: expected {indexed} bytes, found {size}; {advice}")
    counts = table["extensions"].combine_chunks().value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    names, *columns = (table[name].combine_chunks().flatten() for name in ("extensions", *_NUMBERS))
    numbers = [column.to_numpy(zero_copy_only=False) for column in columns]
    if not all(len(each) == len(names) for each in numbers) or not _is_within(numbers[0], numbers[1], size):
        raise DataError(f"{place}{SUFFIX}: its places are not in the shard; {advice}")
    rows = np.repeat(np.arange(len(table)), counts)
    offsets, sizes, checks = placed = np.zeros((len(_NUMBERS), len(table), len(fields)), np.int64)
    for number, field in enumerate(fields):
        there = np.flatnonzero(pa.compute.equal(names, field).to_numpy(zero_copy_only=False))
        placed[:, rows[there], number] = [each[there] for each in numbers]
    return Placed(table["key"].to_pylist(), offsets, sizes, checks, table["cls"].fill_null(-1).to_numpy())


def extensions_in(content: bytes, sample: int) -> list[str]:
    """The extensions of a sample's files, by an index that is in order, and the sample's number in the shard."""
    found: list[str] = parquet.read_table(io.BytesIO(content[_FIRST:]), columns=["extensions"])["extensions"][
        sample
    ].as_py()
    return found


def _is_within(starts: Any, lengths: Any, size: int) -> bool:
    numbers = starts.dtype == lengths.dtype == np.int64  # another where a place is null
    return bool(numbers and (starts >= BLOCK).all() and (lengths >= 0).all() and (lengths <= size - starts).all())
