"""The files of a table, as blocks of rows that are read by their number."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast
from weakref import WeakValueDictionary

import numpy as np

from raytorch.errors import DataError
from raytorch.sources.csv_tables import SUFFIXES as CSV
from raytorch.sources.csv_tables import ConvertedCsv, csv_schema, first_csv_rows
from raytorch.sources.files import File, Root
from raytorch.sources.last_used import LastUsed
from raytorch.sources.table_columns import Columns
from raytorch.sources.table_formats import ARROW, MISTAKES, PARQUET, Array, MappedTable, TableFile, open_table, told

SUFFIXES = (*PARQUET, *ARROW, *CSV)
_MOST_OPEN = 256

_converted: "WeakValueDictionary[Any, ConvertedCsv]" = WeakValueDictionary()


class _Block(NamedTuple):
    file: int
    number: int
    """Among the blocks of its file."""
    first: int
    """Rows of its file before it."""
    rows: int


class TableFiles:
    """The blocks of some files, one after the other."""

    def __init__(
        self, root: Root, files: Sequence[File], columns: Columns, converted: ConvertedCsv | None = None
    ) -> None:
        """``converted``: what another process has of these files. Raises DataError for files that cannot be read, or
        whose columns differ.
        """
        self._root, self._files, self._columns = root, files, columns
        is_there = converted is not None and converted.is_there
        self.converted = converted if is_there else _csv_of(root, [file for file in files if _is_csv(file)], columns)
        """Of the files that are CSV, if some are."""
        self._opened: LastUsed[int, TableFile] = LastUsed(_MOST_OPEN)
        blocks = [block for file in range(len(files)) for block in self._blocks_of(file)]
        self._blocks = np.array(blocks, dtype=np.int64).reshape(-1, len(_Block._fields))

    @property
    def rows(self) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """Of each block, int64 (M,), at least 1."""
        return self._blocks[:, _Block._fields.index("rows")]

    def read(self, block: int, names: list[str] | None = None) -> Any:
        """Some columns of a block, by default all that are needed. Raises DataError."""
        file, number, first, rows = self._blocks[block].tolist()
        opened = self._open(file)
        with self._telling(f"{self._place(file)}: rows {first + 1:,} to {first + rows:,}"):
            return opened.read(number, names or self._columns.names)

    def is_mapped(self, block: int) -> bool:
        """Tell whether some rows of a block are read without the others."""
        return self._open(int(self._blocks[block, 0])).is_mapped

    def files_of(self, blocks: Array) -> Array:
        """The number of the file that each block is in."""
        files: Array = self._blocks[blocks, 0]
        return files

    def is_flat(self, file: int) -> bool:
        """Tell whether rows of a file are read at once from all of its blocks, in any order. Raises DataError."""
        opened = self._open(file)
        with self._telling(f"{self._place(file)}:"):
            return opened.is_mapped and cast(MappedTable, opened).is_flat(self._columns.names)

    def take(self, blocks: Array, rows: Array) -> Any:
        """Rows of one file that is mapped, by their blocks and numbers there; see :meth:`MappedTable.take`."""
        file = int(self._blocks[blocks[0], 0])
        opened = cast(MappedTable, self._open(file))
        with self._telling(f"{self._place(file)}:"):
            return opened.take(self._blocks[blocks, 1], rows, self._columns.names)

    def place(self, block: int, row: int) -> str:
        """A row of a block as messages name it."""
        file, _, first, _ = self._blocks[block].tolist()
        return place_of_row(self._root, self._files[file], first + row)

    @contextmanager
    def _telling(self, where: str) -> Iterator[None]:
        try:
            yield
        except DataError:
            raise
        except MISTAKES as error:
            raise DataError(f"{where} cannot be read: {told(error)}") from error

    def _place(self, file: int) -> str:
        return self._root.place(self._files[file].name)

    def _blocks_of(self, file: int) -> list[_Block]:
        opened, first, blocks = self._open(file), 0, []
        with self._telling(f"{self._place(file)}:"):
            sizes = opened.sizes
        for number, rows in enumerate(sizes):
            if rows:
                blocks.append(_Block(file, number, first, rows))
            first += rows
        return blocks

    def _open(self, file: int) -> TableFile:
        return self._opened.get(file, lambda: self._new(self._files[file]))

    def _new(self, file: File) -> TableFile:
        if self.converted and _is_csv(file):
            return self.converted.file(file.name)
        opened = open_table(self._root, file)
        self._columns.require_same(opened.schema, self._root.place(file.name))
        return opened


def schema_of(root: Root, file: File, delimiter: str | None = None) -> Any:
    """Names and types of the columns of a file. Raises DataError."""
    if not file.name.lower().endswith(SUFFIXES):
        kinds = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        raise DataError(f"{root.place(file.name)}: expected a table, of a name that ends with {kinds}")
    return csv_schema(root, file, delimiter) if _is_csv(file) else open_table(root, file).schema


def first_rows(root: Root, file: File, names: list[str], delimiter: str | None) -> Any:
    """Some columns of the first rows of a file that has some. Raises DataError."""
    if _is_csv(file):
        return first_csv_rows(root, file, delimiter)
    opened = open_table(root, file)
    return opened.read(0, names) if opened.sizes else opened.schema.empty_table()


def place_of_row(root: Root, file: File, row: int) -> str:
    """A row as messages name it: by its number in the file, from 1, or in text by its line."""
    return f"{root.place(file.name)}: {f'line {row + 2:,}' if _is_csv(file) else f'row {row + 1:,}'}"


def stamp(root: Root, files: Sequence[File]) -> tuple[Any, ...]:
    """What is another for other files, and for those that were changed since."""
    return (root.in_full, *((file, root.stamp(file.name)) for file in files))


def _csv_of(root: Root, files: Sequence[File], columns: Columns) -> ConvertedCsv | None:
    """The files once converted, for all splits that read them in this process."""
    if not files:
        return None
    kinds = {name: columns.kind(name) for name in columns.names}
    key = stamp(root, files), *kinds.items(), columns.is_classification, columns.delimiter
    converted = _converted.get(key)
    if converted is None:
        converted = _converted[key] = ConvertedCsv(root, files, columns)
    return converted


def _is_csv(file: File) -> bool:
    return file.name.lower().endswith(CSV)
