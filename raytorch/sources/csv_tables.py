"""Tables of comma-separated values, which are read once, into a file that can be read by position."""

import codecs
import json
import mmap
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Event
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
_OTHERS = (";", "\t", "|", ",")
_LAST_READ_S = 1.0


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
                    self._rows[file.name] = list(_written(_blocks(root, file, types, columns.delimiter), writer))
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


def csv_schema(root: Root, file: File, delimiter: str | None) -> Any:
    """Names and types of the columns of a file, by its first rows. Raises DataError."""
    schema = first_csv_rows(root, file, delimiter).schema
    other = next((each for each in _OTHERS if len(schema) == 1 and each in schema.names[0]), None)
    if other and delimiter is None:
        raise DataError(
            f"{root.place(file.name)}: expected {_delimiter(file, None)!r} between columns, found one column, "
            f"{schema.names[0]!r:.80}; set data.delimiter to {json.dumps(other)}"
        )
    return schema


def first_csv_rows(root: Root, file: File, delimiter: str | None) -> Any:
    """The first rows of a file, of types that follow from them. Raises DataError."""
    with _telling(root.place(file.name)):
        begin = _content(file, RangeFile(root, file)).read(_AT_ONCE + 1)  # so that the first block is none that ends
        _require_text(begin, root.place(file.name))
        with _opened(pa.BufferReader(begin), _delimiter(file, delimiter), use_threads=False) as reader:
            return pa.Table.from_batches([batch for _, batch in zip(range(1), reader, strict=False)], reader.schema)


def _require_text(begin: bytes, place: str) -> None:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(begin)
    except UnicodeDecodeError as error:
        line = begin.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{place}: line {line:,}: expected text in UTF-8, found the byte 0x{begin[error.start]:02x}; write "
            "the file as UTF-8 (it may be in Latin-1 or UTF-16)"
        ) from None


def _type_of(columns: Columns, name: str) -> Any:
    """Numbers are read as fractions, so that a file may begin with whole ones; classes are told apart as they are."""
    kind = columns.types[name]
    if columns.kind(name) == "categories":
        return pa.large_string()
    is_whole = pa.types.is_integer(kind) and columns.is_classification and name == columns.target
    return pa.bool_() if pa.types.is_boolean(kind) else pa.int64() if is_whole else pa.float64()


def _blocks(root: Root, file: File, types: dict[str, Any], delimiter: str | None) -> Iterator[Any]:
    options = csv.ConvertOptions(include_columns=list(types), column_types=types, strings_can_be_null=True)
    between = _delimiter(file, delimiter)
    with _telling(root.place(file.name)):
        try:
            with _Ahead(root, file) as source:
                yield from _opened(_content(file, source), between, use_threads=True, convert_options=options)
        except pa.ArrowInvalid:  # which tells of the line where it is read without threads
            with _Ahead(root, file) as source:
                for _ in _opened(_content(file, source), between, use_threads=False, convert_options=options):
                    pass
            raise


class _Ahead(RangeFile):
    """A file that a thread of Arrow's reads ahead, which must not be in Python when the process ends."""

    def __init__(self, root: Root, file: File) -> None:
        super().__init__(root, file)
        self._is_wanted, self._ended = True, Event()

    def read(self, size: int | None = -1) -> bytes:
        content = super().read(size) if self._is_wanted else b""
        if not content:
            self._ended.set()
        return content

    def __exit__(self, *_: object) -> None:
        self._is_wanted = False
        self._ended.wait(_LAST_READ_S)  # not for ever, as no thread reads while enough has been read ahead


def _content(file: File, source: RangeFile) -> Any:
    content = pa.PythonFile(source, "r")
    return pa.CompressedInputStream(content, "gzip") if file.name.lower().endswith(".gz") else content


def _delimiter(file: File, delimiter: str | None) -> str:
    return delimiter or ("\t" if ".tsv" in file.name.lower()[-7:] else ",")


def _opened(content: Any, delimiter: str, *, use_threads: bool, **options: Any) -> Any:
    return csv.open_csv(
        content,
        read_options=csv.ReadOptions(block_size=_AT_ONCE, use_threads=use_threads),
        parse_options=csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
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
    if "invalid UTF8" in reason:
        return f"{where}: expected text in UTF-8; write the file as UTF-8 (it may be in Latin-1)"
    if value:
        what = {"double": "a number", "int64": "a whole number", "bool": "true or false"}.get(value[1], value[1])
        return f"{where}: expected {what}, as in the first lines of the first file, found {value[2]!r:.80}"
    return f"{where}: expected comma-separated values below a line of names: {reason:.200}"
