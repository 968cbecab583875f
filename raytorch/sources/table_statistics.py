"""What the training files of a table are to say before rows become numbers: found in one pass, block by block."""

from math import sqrt
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import compute as pc

from raytorch.config.sources import TableData
from raytorch.errors import DataError
from raytorch.sources.table_columns import Columns, canonical
from raytorch.sources.table_files import TableFiles

Numbers = np.ndarray[Any, np.dtype[np.float64]]
_EPSILON = float(np.finfo(np.float64).eps)
_MOST_VALUES = 100_000
_MOST_UNSAID = 1_000
"""Whole numbers that are taken for classes where the section does not say that they are."""


class Statistics(NamedTuple):
    """Of the training files, by column."""

    moments: dict[str, tuple[float, float]]
    """Mean and standard deviation (of the population) of the numbers that are there; 0 of a column whose numbers differ
    by no more than the rounding of so many, as scikit-learn's StandardScaler has it."""
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
    """A column as an array of a type in which values are compared, null where one is missing, or has no like there."""
    column = _whole(pa.array(column) if isinstance(column, np.ndarray) else _decoded(column))
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
    if pa.types.is_uint64(column.type) and kind == pa.int64():
        column = pc.if_else(pc.less_equal(column, pa.scalar(2**63 - 1, pa.uint64())), column, None)
    values = pc.cast(column, kind, safe=False)
    if kind == pa.large_string() or (pa.types.is_integer(column.type) and kind == pa.int64()) or kind == column.type:
        return values
    return pc.if_else(pc.equal(pc.cast(values, column.type, safe=False), column), values, None)


def _decoded(column: Any) -> Any:
    """A column with its values in place of their numbers in a dictionary, of whatever they are."""
    if not pa.types.is_dictionary(column.type):
        return column
    kind = pa.large_string() if canonical(column.type) == pa.large_string() else column.type.value_type
    parts = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    return pa.chunked_array([pc.cast(part.dictionary, kind).take(part.indices) for part in parts], kind)


def _whole(column: Any) -> Any:
    if not isinstance(column, pa.ChunkedArray):
        return column
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


class _Moments:
    """Mean and variance of what comes in parts (Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for
    Computing Sample Variances, 1979).
    """

    def __init__(self) -> None:
        self._count, self._mean, self._squares = 0, np.float64(0), np.float64(0)
        self._has_infinite = False

    def add(self, numbers: Numbers) -> None:
        present = numbers[~np.isnan(numbers)]
        if not present.size:
            return
        self._has_infinite = self._has_infinite or bool(np.isinf(present).any())
        with np.errstate(over="ignore", invalid="ignore"):  # which is told at the end
            mean = np.float64(present.mean())
            squares = np.square(present - mean).sum()
            count, apart = self._count + present.size, mean - self._mean
            self._squares += squares + apart**2 * self._count * present.size / count
            self._mean += apart * present.size / count
        self._count = count

    def mean_and_deviation(self, name: str) -> tuple[float, float]:
        if not self._count:
            raise DataError(f"the training files have no number in column {name}; leave it out: data.ignore")
        if not np.isfinite(self._squares):
            what = "infinite numbers" if self._has_infinite else "numbers that are too large"
            raise DataError(f"column {name} of the training files has {what}, of which there is no mean")
        mean, variance = float(self._mean), float(self._squares / self._count)
        rounding = self._count * _EPSILON
        is_constant = variance <= rounding * variance + (rounding * mean) ** 2
        return mean, 0.0 if is_constant else sqrt(variance)


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
