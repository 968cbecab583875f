"""Files of tables in the formats that have their columns apart: parquet and Arrow IPC, which Feather 2 is too."""

from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from pyarrow import ipc, parquet

from raytorch.errors import DataError
from raytorch.sources.files import File, Root
from raytorch.sources.range_file import RangeFile

Array = np.ndarray[Any, Any]

PARQUET = (".parquet", ".pq")
ARROW = (".arrow", ".feather", ".ipc")
_FILE_BEGINS = b"ARROW1"
MISTAKES = (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OSError, ValueError, KeyError, IndexError)
"""What reading a damaged file raises; and not the lack of memory."""
_MOST_STARTS = 2**20
"""Columns of blocks of which it is known where they begin, in a file whose rows are read one by one."""


class TableFile(Protocol):
    """A table whose blocks are read by their number."""

    schema: Any
    """Names and types of its columns."""
    is_mapped: bool
    """Whether some rows of a block are read without the others."""

    @property
    def sizes(self) -> list[int]:
        """Rows of each block."""

    def read(self, number: int, names: list[str]) -> Any:
        """Columns of a block: a table or a record batch."""


def open_table(root: Root, file: File) -> TableFile:
    """Open a file by the end of its name. Raises DataError."""
    is_parquet = file.name.lower().endswith(PARQUET)
    try:
        return Parquet(root, file) if is_parquet else ArrowIpc(pa.memory_map(str(root.local(file.name))).read_buffer())
    except MISTAKES as error:
        kind = "a parquet file" if is_parquet else "an Arrow IPC (Feather 2) file"
        raise DataError(f"{root.place(file.name)}: expected {kind}, whole and undamaged: {told(error)}") from error


def told(error: Exception) -> str:
    """What a library says is wrong, in one line."""
    return " ".join(str(error).split())[:200]


class Gathered(NamedTuple):
    """Rows from here and there: columns that are NumPy's, or Arrow's."""

    columns: dict[str, Any]
    num_rows: int

    def column(self, name: str) -> Any:
        """One of them."""
        return self.columns[name]


class MappedTable(TableFile, Protocol):
    """One whose rows are read one by one."""

    def is_flat(self, names: list[str]) -> bool:
        """Tell whether columns are numbers that are all there: these are read at once from all blocks, in any order."""

    def take(self, numbers: Array, rows: Array, names: list[str]) -> Gathered:
        """Columns of rows, each by the number of its block and its own there. Where not all are flat, those of a
        block come together.
        """


class Parquet:
    """Of the columns that are asked for, those of a row group are read by ranges and decoded as a whole."""

    is_mapped = False

    def __init__(self, root: Root, file: File) -> None:
        self._file = parquet.ParquetFile(pa.PythonFile(RangeFile(root, file), "r"), pre_buffer=True)
        self.schema = self._file.schema_arrow

    @property
    def sizes(self) -> list[int]:
        metadata = self._file.metadata
        return [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]

    def read(self, number: int, names: list[str]) -> Any:
        return self._file.read_row_group(number, columns=names)


class ArrowIpc:
    """Bytes in the layout of files, or of streams. They are not copied where they are not compressed."""

    def __init__(self, content: Any) -> None:
        self._content = content
        self._is_file = content[: len(_FILE_BEGINS)].to_pybytes() == _FILE_BEGINS
        self._whole: Any = ipc.open_file(content) if self._is_file else ipc.open_stream(content)
        self.schema = self._whole.schema
        if not self._is_file:
            self._whole = list(self._whole)
        self.is_mapped = all(map(self._is_within, self._first_buffers()))
        self._undamaged: set[tuple[int, str]] = set()
        if not (self._is_file or self.is_mapped):
            raise ValueError("a stream that is compressed cannot be read by position; write it as a file")

    @property
    def sizes(self) -> list[int]:
        batches = self._whole
        if self._is_file:
            # By one column where they are compressed, since all that are asked for are decompressed.
            reader = self._whole if self.is_mapped else self._of_columns(self.schema.names[:1])
            batches = map(reader.get_batch, range(reader.num_record_batches))
        return [batch.num_rows for batch in batches]

    def read(self, number: int, names: list[str]) -> Any:
        reader = self._whole if self.is_mapped else self._of_columns(names)
        batch = reader.get_batch(number) if self._is_file else reader[number]
        batch = batch if names == batch.schema.names else batch.select(names)
        batch.validate()
        for name in names:
            self._require_undamaged(number, name, batch.column(name))
        return batch

    def _require_undamaged(self, number: int, name: str, column: Any) -> None:
        """Refuse what would be read beyond the file's end, or is no text: found out by all of a column, and so once."""
        if _numpy_type(column.type) is None and (number, name) not in self._undamaged:
            column.validate(full=True)
            self._undamaged.add((number, name))

    def is_flat(self, names: list[str]) -> bool:
        """See :meth:`MappedTable.is_flat`."""
        return self.is_mapped and self._starts.keys() >= set(names)

    def take(self, numbers: Array, rows: Array, names: list[str]) -> Gathered:
        """See :meth:`MappedTable.take`."""
        found: dict[str, Any] = {}
        for name in names:
            if starts := self._starts.get(name):
                view, begins = starts
                found[name] = view[begins[numbers] + rows]
        others = [name for name in names if name not in found]
        if others:
            ends = [*(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
            parts = [
                self.read(int(numbers[begin]), others).take(pa.array(rows[begin:end]))
                for begin, end in pairwise([0, *ends])
            ]
            table = pa.Table.from_batches(parts)
            found |= {name: table.column(name) for name in others}
        return Gathered(found, len(rows))

    @cached_property
    def _starts(self) -> dict[str, tuple[Array, Array]]:
        """Of columns of numbers of which none is missing: the file as such numbers, and where among them each block's
        begin.
        """
        batches = self._batches()
        if not self.is_mapped or len(batches) * len(self.schema) > _MOST_STARTS:
            return {}
        found = {}
        for name in self.schema.names:
            columns = [batch.column(name) for batch in batches] if self.schema.names.count(name) == 1 else []
            kind = _numpy_type(self.schema.field(name).type) if columns else None
            if kind is None or any(column.null_count for column in columns):
                continue
            begins = [self._begin(column, kind.itemsize) for column in columns]
            if None not in begins:
                size = self._content.size // kind.itemsize
                found[name] = np.frombuffer(self._content, kind, size), np.array(begins, dtype=np.int64)
        return found

    def _begin(self, column: Any, size: int) -> int | None:
        """Where the numbers of a column begin; None if that is between two of them, or elsewhere than in the file."""
        if not len(column):
            return 0
        [_, buffer] = column.buffers()
        offset = int(buffer.address) - int(self._content.address)
        fits = self._is_within(buffer) and buffer.size >= size * len(column) and offset % size == 0
        return offset // size + column.offset if fits else None

    def _batches(self) -> list[Any]:
        if not self._is_file:
            return list(self._whole)
        return [self._whole.get_batch(number) for number in range(self._whole.num_record_batches)]

    def _of_columns(self, names: list[str]) -> Any:
        """A reader of some columns: it copies them."""
        places = sorted(place for name in names for place in self.schema.get_all_field_indices(name))
        return ipc.open_file(self._content, options=ipc.IpcReadOptions(included_fields=places))

    def _first_buffers(self) -> list[Any]:
        """Those of the first block that has rows."""
        count = self._whole.num_record_batches if self._is_file else len(self._whole)
        for number in range(count):
            batch = self._whole.get_batch(number) if self._is_file else self._whole[number]
            if batch.num_rows:
                return [each for column in batch.columns for each in column.buffers() if each is not None and each.size]
        return []

    def _is_within(self, buffer: Any) -> bool:
        begin: int = self._content.address
        return begin <= int(buffer.address) < begin + int(self._content.size)


def _numpy_type(kind: Any) -> "np.dtype[Any] | None":
    is_plain = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    return np.dtype(kind.to_pandas_dtype()) if is_plain else None
