"""Rows of a table as numbers: features float32 (B, F), and targets."""

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from pyarrow import compute as pc

from raytorch.config.sources import TableData
from raytorch.sources.table_columns import Columns
from raytorch.sources.table_statistics import Statistics, as_numbers, as_values

Array = np.ndarray[Any, Any]

_LARGEST = float(np.finfo(np.float32).max)
_NO_TARGET = "the target is missing; leave the row out of the file"


class Rows(NamedTuple):
    """Rows as numbers."""

    features: Array
    """float32 (B, F)."""
    targets: Array
    """float32 (B,), or the numbers of classes, int64 (B,)."""
    is_bad: Array
    """Of each, whether it lacks what has no place among these, bool (B,); see :meth:`Encoding.fault`."""

    def write(self, places: Array, rows: "Rows") -> None:
        """Put rows into places of these."""
        for array, part in zip(self, rows, strict=True):
            array[places] = part


class Encoding:
    """How rows become numbers, by a section and what the training files say."""

    def __init__(self, section: TableData, columns: Columns, found: Statistics) -> None:
        self._section, self._columns, self._found = section, columns, found
        widths = [self._width(name) for name in columns.features]
        self._starts = np.cumsum([0, *widths]).tolist()

    @property
    def width(self) -> int:
        """How many features there are."""
        return int(self._starts[-1])

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What a model is told, and is kept beside its weights: all that turns a row into its input."""
        moments, values = self._found
        facts: dict[str, Any] = {"input_shape": [self.width], "feature_names": self._feature_names()}
        categories = {name: values[name].to_pylist() for name in self._columns.features if name in values}
        if categories:
            facts["feature_categories"] = categories
        if self._section.missing == "mean" or self._section.standardize:
            facts["feature_means"] = {name: mean for name, (mean, _) in moments.items()}
        if self._section.standardize:
            facts["feature_deviations"] = {name: deviation for name, (_, deviation) in moments.items()}
        if self._columns.is_classification:
            classes = values[self._columns.target].to_pylist()
            facts |= {"num_classes": len(classes), "classes": classes}
        else:
            facts["num_targets"] = 1
        return facts

    def empty(self, rows: int) -> Rows:
        """Room for so many rows."""
        kind = np.int64 if self._columns.is_classification else np.float32
        return Rows(np.empty((rows, self.width), np.float32), np.empty(rows, kind), np.empty(rows, bool))

    def encode(self, table: Any) -> Rows:
        """All rows of a table or record batch."""
        features = np.zeros((table.num_rows, self.width), np.float32)
        targets, is_bad = self.targets(table.column(self._columns.target))
        for name, start, end in zip(self._columns.features, self._starts, self._starts[1:], strict=False):
            column, part = table.column(name), features[:, start:end]
            if self._columns.kind(name) == "numbers":
                self._write_numbers(name, as_numbers(column), part, is_bad)
            else:
                self._write_categories(name, column, part, is_bad)
        return Rows(features, targets, is_bad)

    def targets(self, column: Any) -> tuple[Array, Array]:
        """The targets of a column, and whether each is bad."""
        if self._columns.is_classification:
            classes = self._codes(self._columns.target, column)
            return classes, classes < 0
        numbers = as_numbers(column)
        is_bad = np.isnan(numbers) | _is_too_large(numbers)
        return np.where(is_bad, 0, numbers).astype(np.float32), is_bad

    def fault(self, row: Any) -> str:
        """What is wrong with a row that is bad, and what to do."""
        for name in self._columns.names:
            told = self._fault(name, row.column(name))
            if told:
                return f"column {name}: {told}"
        return "it cannot be read twice in the same way"

    def _write_numbers(self, name: str, numbers: Array, part: Array, is_bad: Array) -> None:
        missing = np.isnan(numbers)
        mean, deviation = self._found.moments.get(name, (0.0, 1.0))
        if missing.any():
            if self._section.missing == "error":
                is_bad |= missing
            numbers = np.where(missing, mean if self._section.missing == "mean" else 0.0, numbers)
        with np.errstate(over="ignore"):
            part[:, 0] = (numbers - mean) / (deviation or 1.0) if self._section.standardize else numbers
        is_bad |= np.isinf(part[:, 0]) & np.isfinite(numbers)

    def _write_categories(self, name: str, column: Any, part: Array, is_bad: Array) -> None:
        codes = self._codes(name, column)
        if self._section.unknown == "other":
            is_other = codes < 0
            if self._section.missing == "error":
                is_other &= ~_is_null(column)
            codes[is_other] = len(self._found.values[name])
        is_bad |= codes < 0
        if self._section.categories == "codes":
            part[:, 0] = codes
        else:
            rows = np.flatnonzero(codes >= 0)
            part[rows, codes[rows]] = 1

    def _codes(self, name: str, column: Any) -> Array:
        """The number of each value among the known ones, int64; -1 for others."""
        values = self._found.values[name]
        found = pc.index_in(as_values(column, values.type), value_set=values).fill_null(-1)
        codes: Array = found.to_numpy(zero_copy_only=False).astype(np.int64)
        return codes

    def _width(self, name: str) -> int:
        if self._columns.kind(name) == "numbers" or self._section.categories == "codes":
            return 1
        return len(self._found.values[name]) + (self._section.unknown == "other")

    def _feature_names(self) -> list[str]:
        names = []
        for name in self._columns.features:
            if self._columns.kind(name) == "numbers" or self._section.categories == "codes":
                names.append(name)
            else:
                others = [f"{name} (other)"] if self._section.unknown == "other" else []
                names += [*(f"{name}={value}" for value in self._found.values[name].to_pylist()), *others]
        return names

    def _fault(self, name: str, column: Any) -> str | None:
        if name in self._found.values:
            return self._value_fault(name, column)
        number = as_numbers(column)[0]
        if not np.isnan(number):
            return self._size_fault(name, number)
        if name == self._columns.target:
            return _NO_TARGET
        if self._section.missing == "error":
            return "a number is missing; set data.missing to mean or zero, or leave the row out of the file"
        return None

    def _size_fault(self, name: str, number: np.float64) -> str | None:
        part, is_bad = np.zeros((1, 1), np.float32), np.zeros(1, bool)
        if name == self._columns.target:
            is_bad |= _is_too_large(np.array([number]))
        else:
            self._write_numbers(name, np.array([number]), part, is_bad)
        return f"{number:g} is too large for the numbers of a batch, which are float32" if is_bad[0] else None

    def _value_fault(self, name: str, column: Any) -> str | None:
        known, is_target = self._found.values[name], name == self._columns.target
        value = as_values(column, known.type)[0].as_py()
        has_other = self._section.unknown == "other" and not is_target
        raw = column[0].as_py()
        if value is None and raw is not None and raw == raw:  # which is none that those of the first file can be
            return f"expected one of the {len(known):,} values of the training files, found {raw!r:.80}"
        if value is None and is_target:
            return _NO_TARGET
        if value is None and not (has_other and self._section.missing != "error"):
            keys = ["data.missing to zero"] if self._section.missing == "error" else []
            keys += [] if has_other else ["data.unknown to other"]
            return f"a value is missing; set {' and '.join(keys)} to give it a code, or leave the row out of the file"
        if value is None or has_other or value in known.to_pylist():
            return None
        rest = "" if is_target else "; set data.unknown to other to give it a code"
        return f"expected one of the {len(known):,} values of the training files, found {value!r:.80}{rest}"


def _is_too_large(numbers: Array) -> Array:
    """Tell which numbers float32 has none for, beside those that are infinite."""
    too_large: Array = np.isfinite(numbers) & (np.abs(numbers) > _LARGEST)
    return too_large


def _is_null(column: Any) -> Array:
    """Of each value of a column, whether it is missing."""
    if isinstance(column, np.ndarray):
        return np.zeros(len(column), bool)
    nulls: Array = column.is_null().to_numpy(zero_copy_only=False)
    return nulls
