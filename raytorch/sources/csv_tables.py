"""Tables of comma-separated values, which are read once, into a file that can be read by position."""

import mmap
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from weakref import finalize

import pyarrow as pa
from pyarrow import csv, ipc

from raytorch.errors import DataError
from raytorch.sources.files import File, Root
from raytorch.sources.range_file import RangeFile
from raytorch.sources.table_columns import Columns
from raytorch.sources.table_formats import MISTAKES, Array, ArrowIpc, Gathered, TableFile

SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
_AT_ONCE = 8 * 2**20
"""Bytes of text of which a block is made."""


class ConvertedCsv:
    """The needed columns of some files, memory-mapped from a file without a name in the folder for temporary files."""

    _table: ArrowIpc | None = None
    _descriptor = -1

    def __init__(self, root: Root, files: Sequence[File], columns: Columns) -> None:
        """Raises DataError for a file that is not in order."""
        self._rows: dict[str, list[int]] = {}
        types = {name: _type_of(columns, name) for name in columns.names}
        with tempfile.TemporaryFile(prefix="raytorch-") as spool:
            with ipc.new_file(pa.PythonFile(spool, "w"), pa.schema(types.items())) as writer:
                for file in files:
                    self._rows[file.name] = list(_written(_blocks(root, file, types), writer))
            spool.flush()
            self._map(os.dup(spool.fileno()))

    def __getstate__(self) -> dict[str, Any]:
        """A file without a name is found by other processes of the machine where one has it open."""
        path = f"/proc/{os.getpid()}/fd/{self._descriptor}"
        return {"_rows": self._rows, "_found": (path, _identity(os.fstat(self._descriptor)))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._rows, (path, identity) = state["_rows"], state["_found"]
        with suppress(OSError):
            if _identity(os.stat(path)) == identity:  # noqa: PTH116 (as fstat is told)
                self._map(os.open(path, os.O_RDONLY | os.O_CLOEXEC))

    def _map(self, descriptor: int) -> None:
        self._descriptor = descriptor
        finalize(self, os.close, descriptor)
        content = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        self._table = ArrowIpc(pa.py_buffer(content))

    @property
    def is_there(self) -> bool:
        """Whether it can be read, also where it has come from another process."""
        return self._table is not None

    def file(self, name: str) -> TableFile:
        """One of the files."""
        earlier = list(self._rows)[: list(self._rows).index(name)]
        assert self._table
        return _Part(self._table, sum(len(self._rows[each]) for each in earlier), self._rows[name])


class _Part:
    """Some blocks of a table that follow one another."""

    is_mapped = True

    def __init__(self, whole: ArrowIpc, first: int, sizes: list[int]) -> None:
        self._whole, self._first, self.sizes, self.schema = whole, first, sizes, whole.schema

    def read(self, number: int, names: list[str]) -> Any:
        return self._whole.read(self._first + number, names)

    def is_flat(self, names: list[str]) -> bool:
        return self._whole.is_flat(names)

    def take(self, numbers: Array, rows: Array, names: list[str]) -> Gathered:
        return self._whole.take(self._first + numbers, rows, names)


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _written(blocks: Iterable[Any], writer: Any) -> Iterator[int]:
    for block in blocks:
        writer.write_batch(block)
        yield block.num_rows


def csv_schema(root: Root, file: File) -> Any:
    """Names and types of the columns of a file, by its first rows. Raises DataError."""
    with _telling(root.place(file.name)):
        return _opened(root, file, use_threads=False).schema


def first_csv_rows(root: Root, file: File) -> Any:
    """The first rows of a file, of types that follow from them. Raises DataError."""
    with _telling(root.place(file.name)), _opened(root, file, use_threads=False) as reader:
        return pa.Table.from_batches([batch for _, batch in zip(range(1), reader, strict=False)], reader.schema)


def _type_of(columns: Columns, name: str) -> Any:
    """Numbers are read as fractions, so that a file may begin with whole ones; classes are told apart as they are."""
    kind = columns.types[name]
    if columns.kind(name) == "categories":
        return pa.large_string()
    is_whole = pa.types.is_integer(kind) and columns.is_classification and name == columns.target
    return pa.bool_() if pa.types.is_boolean(kind) else pa.int64() if is_whole else pa.float64()


def _blocks(root: Root, file: File, types: dict[str, Any]) -> Iterator[Any]:
    place = root.place(file.name)
    options = csv.ConvertOptions(include_columns=list(types), column_types=types, strings_can_be_null=True)
    with _telling(place):
        try:
            yield from _opened(root, file, use_threads=True, convert_options=options)
        except pa.ArrowInvalid:  # which tells of the line where it is read without threads
            for _ in _opened(root, file, use_threads=False, convert_options=options):
                pass
            raise


def _opened(root: Root, file: File, *, use_threads: bool, **options: Any) -> Any:
    name = file.name.lower()
    source = pa.PythonFile(RangeFile(root, file), "r")
    return csv.open_csv(
        pa.CompressedInputStream(source, "gzip") if name.endswith(".gz") else source,
        read_options=csv.ReadOptions(block_size=_AT_ONCE, use_threads=use_threads),
        parse_options=csv.ParseOptions(delimiter="\t" if ".tsv" in name[-7:] else ",", newlines_in_values=True),
        **options,
    )


@contextmanager
def _telling(place: str) -> Iterator[None]:
    try:
        yield
    except MISTAKES as error:
        raise DataError(_told(place, " ".join(str(error).split()))) from error


def _told(place: str, reason: str) -> str:
    line = re.search(r"Row #(\d+): ", reason)
    where = f"{place}: line {int(line[1]):,}" if line else place
    value = re.search(r"conversion error to (\w+): invalid value '(.*)'", reason)
    if value:
        what = {"double": "a number", "int64": "a whole number", "bool": "true or false"}.get(value[1], value[1])
        return f"{where}: expected {what}, as in the first lines of the first file, found {value[2]!r:.80}"
    return f"{where}: expected comma-separated values below a line of names: {reason:.200}"
