"""Tables in files: rows of features, and a target."""

import logging
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raytorch.config.sources import TableData
from raytorch.errors import DataError
from raytorch.sources.blocks import TOGETHER
from raytorch.sources.by_block import InBlock, by_block
from raytorch.sources.csv_tables import ConvertedCsv
from raytorch.sources.files import File, Root
from raytorch.sources.last_used import LastUsed
from raytorch.sources.table_columns import Columns, columns_of
from raytorch.sources.table_encoding import Encoding, Rows
from raytorch.sources.table_files import SUFFIXES, TableFiles, schema_of, stamp
from raytorch.sources.table_statistics import statistics
from raytorch.sources.table_text import refuse_spoiled_numbers, refuse_text

Array = np.ndarray[Any, Any]

logger = logging.getLogger("raytorch")

_IN_ORDER = 2
"""Blocks that are kept where rows are read one after the other."""
_SHARE, _MOST_NUMBERS = 8, 2**22
"""A mapped block is made numbers as a whole when one in so many of its rows was taken, unless these were too many."""
_TOO_FEW = 64
"""It is said where a table has been decoded twice for less than one of so many of its rows."""
_SHOWN = 8
"""Features of a row that are shown."""
_MANY = 300
"""It is said where one column becomes more features than these."""

_encodings: LastUsed[Any, tuple[Columns, Encoding]] = LastUsed(2)
"""What the training files say is found once for all splits of a process."""


class Table:
    """A batch is the features, float32 (B, F), and the targets, float32 (B,) or the numbers of classes, int64 (B,)."""

    def __init__(self, section: TableData, split: str, training: bool) -> None:
        """Raises DataError for files that are not in order."""
        self._root, self._skips = Root.of(section), section.most_skipped > 0
        self._files = self._root.find(section.files_of(split), SUFFIXES)
        self._columns, self._encoding = self._by_training_files(section)
        self._table: TableFiles | None = None
        self._converted: ConvertedCsv | None = None
        self._most = TOGETHER + 1 if training else _IN_ORDER
        self._kept: LastUsed[int, Rows] = LastUsed(self._most)
        self._ends = self._opened().rows.cumsum()
        self._begins = self._ends - self._opened().rows
        self._asked, self._decoded, self._is_told = 0, 0, False
        self._taken: dict[int, int] = {}

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def facts(self) -> dict[str, Any]:
        """Of the training files: the shape of the features, their names, the classes, and what they were made with."""
        return self._encoding.facts

    @property
    def blocks(self) -> Tensor:
        """Rows of each row group of parquet files, and of each record batch of others."""
        return torch.from_numpy(self._opened().rows.copy())

    @property
    def labels(self) -> Any:
        """The number of each row's class, int64 (N,); None of a regression.

        Where rows may be skipped, those that have none are masked. Raises DataError for the first such row otherwise.
        """
        if not self._columns.is_classification:
            return None
        labels, is_bad = np.zeros(len(self), np.int64), np.zeros(len(self), bool)
        for block, (begin, end) in enumerate(zip(self._begins.tolist(), self._ends.tolist(), strict=True)):
            try:
                column = self._opened().read(block, [self._columns.target]).column(self._columns.target)
                labels[begin:end], is_bad[begin:end] = self._encoding.targets(column)
            except DataError:
                if not self._skips:
                    raise
                is_bad[begin:end] = True
        if is_bad.any() and not self._skips:
            raise self._fault(int(is_bad.argmax()))
        return np.ma.MaskedArray(labels, is_bad) if is_bad.any() else torch.from_numpy(labels)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The rows, int64 (B,), one after the other. Raises DataError for one that has no place in it."""
        rows = indices.numpy()
        found = self._gathered(rows)
        if found.is_bad.any():
            raise self._fault(int(rows[found.is_bad.argmax()]))
        return torch.from_numpy(found.features), torch.from_numpy(found.targets)

    def describe(self, batch: tuple[Tensor, Tensor]) -> list[dict[str, str]]:
        """The target and the first features of each row by their names, for ``raytorch data show``."""
        names, classes, target = self.facts["feature_names"], self.facts.get("classes"), self._columns.target
        return [
            {target: str(classes[number]) if classes else f"{number:g}"}
            | {name: f"{value:.4g}" for name, value in zip(names[:_SHOWN], values, strict=False)}
            for values, number in zip(batch[0].tolist(), batch[1].tolist(), strict=True)
        ]

    def __getstate__(self) -> dict[str, Any]:
        converted = self._table.converted if self._table else self._converted
        converted = converted if converted and converted.is_there else None
        return self.__dict__ | {"_table": None, "_converted": converted, "_kept": LastUsed(self._most)}

    def _by_training_files(self, section: TableData) -> tuple[Columns, Encoding]:
        files = self._root.find(section.files_of("train"), SUFFIXES)
        unlike = {"name", "train", "validation", "test", "readers"}
        key = section.model_dump_json(exclude=unlike), stamp(self._root, files)
        return _encodings.get(key, lambda: self._new_encoding(section, files))

    def _new_encoding(self, section: TableData, files: list[File]) -> tuple[Columns, Encoding]:
        first = files[0]
        columns = columns_of(section, schema_of(self._root, first, section.delimiter), self._root.place(first.name))
        refuse_text(section, columns, self._root, first)
        table = TableFiles(self._root, files, columns)
        found = statistics(section, table, columns)
        refuse_spoiled_numbers(section, columns, table, found)
        encoding = Encoding(section, columns, found)
        _warn_of_many(section, encoding)
        return columns, encoding

    def _opened(self) -> TableFiles:
        if self._table is None:
            self._table = TableFiles(self._root, self._files, self._columns, self._converted)
        return self._table

    def _gathered(self, rows: Array) -> Rows:
        table, found = self._opened(), self._encoding.empty(len(rows))
        blocks = np.searchsorted(self._ends, rows, side="right")
        files = table.files_of(blocks)
        others = np.ones(len(rows), bool)
        for file in np.unique(files).tolist():
            if table.is_flat(file):
                places = np.flatnonzero(files == file)
                within = rows[places] - self._begins[blocks[places]]
                found.write(places, self._encoding.encode(table.take(blocks[places], within)))
                others[places] = False
        if others.any():
            self._write_by_block(rows, np.flatnonzero(others), files, found)
        return found

    def _write_by_block(self, rows: Array, places: Array, files: Array, found: Rows) -> None:
        """Rows at some places of a batch: from blocks that are kept as numbers, or together from those of a file."""
        table = self._opened()
        self._asked += len(places)
        mapped: dict[int, list[InBlock]] = {}
        for part in by_block(self._ends, rows[places]):
            if self._is_kept(part.block, len(part.within)):
                kept = self._kept.get(part.block, partial(self._decode, part.block))
                found.write(places[part.places], Rows(*(array[part.within] for array in kept)))
            else:
                mapped.setdefault(int(files[places[part.places[0]]]), []).append(part)
        for parts in mapped.values():
            order, within = (np.concatenate([getattr(part, name) for part in parts]) for name in ("places", "within"))
            blocks = np.repeat([part.block for part in parts], [len(part.within) for part in parts])
            found.write(places[order], self._encoding.encode(table.take(blocks, within)))

    def _is_kept(self, block: int, rows: int) -> bool:
        """Tell whether a block of which so many rows are asked for is to be kept as numbers: those that are mapped when
        much of them is asked for, which is as fast as can be in any order then.
        """
        table = self._opened()
        if block in self._kept or not table.is_mapped(block):
            return True
        self._taken[block] = self._taken.get(block, 0) + rows
        size = int(table.rows[block])
        if self._taken[block] * _SHARE < size or size * self._encoding.width > _MOST_NUMBERS:
            return False
        del self._taken[block]
        return True

    def _decode(self, block: int) -> Rows:
        table = self._opened()
        self._decoded += int(table.rows[block])
        if (
            not (self._is_told or table.is_mapped(block))
            and self._decoded > 2 * len(self)
            and self._asked < len(self) / _TOO_FEW
        ):
            self._is_told = True
            logger.warning(
                "data table: %s: %s rows have been decoded for %s that were asked for, as these files are read by "
                "whole row groups; take shuffle: blocks, or write the table as Arrow IPC without compression",
                self._root.place(self._files[0].name),
                f"{self._decoded:,}",
                f"{self._asked:,}",
            )
        return self._encoding.encode(table.read(block))

    def _fault(self, row: int) -> DataError:
        block = int(np.searchsorted(self._ends, row, side="right"))
        table, within = self._opened(), row - int(self._begins[block])
        return DataError(f"{table.place(block, within)}: {self._encoding.fault(table.read(block).slice(within, 1))}")


def _warn_of_many(section: TableData, encoding: Encoding) -> None:
    for name, values in encoding.facts.get("feature_categories", {}).items():
        if section.categories == "one_hot" and len(values) > _MANY:
            logger.warning(
                "data table: column %s has %s different values in the training files, and categories: one_hot makes a "
                "feature of each; if that is not what you want, take categories: codes, or leave it out: data.ignore",
                name,
                f"{len(values):,}",
            )
