"""What the training files of a table are to say before rows become numbers: found in one pass, block by block."""

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import compute as pc

from raytorch.config.sources import TableData
from raytorch.errors import DataError
from raytorch.sources.table_columns import Columns
from raytorch.sources.table_files import TableFiles

Numbers = np.ndarray[Any, np.dtype[np.float64]]
_MOST_VALUES = 100_000
_MOST_UNSAID = 1_000
"""Whole numbers that are taken for classes where the section does not say that they are."""


class Statistics(NamedTuple):
    """Of the training files, by column."""

    moments: dict[str, tuple[float, float]]
    """Mean and standard deviation (of the population) of the numbers that are there."""
    values: dict[str, Any]
    """The values of categories and of classes, sorted: an Arrow array of a type in which they are compared."""


def statistics(section: TableData, files: TableFiles, columns: Columns) -> Statistics:
    """Read what is needed for a section, and nothing where that is nothing. Raises DataError."""
    needs_moments = section.standardize or section.missing == "mean"
    numbers = [name for name in columns.features if needs_moments and columns.kind(name) == "numbers"]
    categories = [name for name in columns.features if columns.kind(name) == "categories"]
    counted = [*categories, *([columns.target] if columns.is_classification else [])]
    moments = {name: _Moments() for name in numbers}
    values = {name: pa.array([], columns.value_type(name)) for name in counted}
    needed = [*numbers, *counted]
    for block in range(len(files.rows)) if needed else ():
        rows = files.read(block, needed)
        for name in numbers:
            moments[name].add(as_numbers(rows.column(name)))
        for name in counted:
            values[name] = _with_more(values[name], rows.column(name), name, _most(section, columns, name))
    return Statistics(
        {name: each.mean_and_deviation(name) for name, each in moments.items()},
        {name: each.take(pc.sort_indices(each)) for name, each in values.items()},
    )


def as_numbers(column: Any) -> Numbers:
    """A column as float64, NaN where a value is missing."""
    if isinstance(column, np.ndarray):
        return column.astype(np.float64)
    numbers: Numbers = _whole(pc.cast(column, pa.float64(), safe=False)).to_numpy(zero_copy_only=False)
    return numbers


def as_values(column: Any, kind: Any) -> Any:
    """A column as an array of a type in which values are compared, null where one is missing."""
    column = pa.array(column) if isinstance(column, np.ndarray) else _whole(column)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    column = pc.cast(column, kind, safe=False)
    return pc.if_else(pc.is_nan(column), None, column) if pa.types.is_floating(kind) else column


def _whole(column: Any) -> Any:
    if not isinstance(column, pa.ChunkedArray):
        return column
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


class _Moments:
    """Mean and variance of what comes in parts (Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for
    Computing Sample Variances, 1979).
    """

    def __init__(self) -> None:
        self._count, self._mean, self._squares = 0, 0.0, 0.0

    def add(self, numbers: Numbers) -> None:
        present = numbers[~np.isnan(numbers)]
        if not present.size:
            return
        mean = float(present.mean())
        squares = float(np.square(present - mean).sum())
        count, apart = self._count + present.size, mean - self._mean
        self._squares += squares + apart**2 * self._count * present.size / count
        self._mean += apart * present.size / count
        self._count = count

    def mean_and_deviation(self, name: str) -> tuple[float, float]:
        if not self._count:
            raise DataError(f"the training files have no number in column {name}; leave it out: data.ignore")
        if not np.isfinite(self._squares):
            raise DataError(f"column {name} of the training files has infinite numbers, of which there is no mean")
        return self._mean, float(np.sqrt(self._squares / self._count))


def _most(section: TableData, columns: Columns, name: str) -> int:
    is_unsaid = name == columns.target and section.task is None and columns.kind(name) == "numbers"
    return _MOST_UNSAID if is_unsaid else _MOST_VALUES


def _with_more(known: Any, column: Any, name: str, most: int) -> Any:
    found = pc.drop_null(pc.unique(as_values(column, known.type)))
    values = pc.unique(pa.concat_arrays([known, found]))
    if len(values) > most:
        what = (
            "say data.task: regression, or classification if they are its classes"
            if most == _MOST_UNSAID
            else "too many to tell apart; leave it out (data.ignore), or write its values as numbers of a scale"
        )
        raise DataError(f"column {name} of the training files has more than {most:,} different values: {what}")
    return values
