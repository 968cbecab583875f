"""Text in tables: whether it is of categories, or of numbers of which some cells are spoiled."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa
from pyarrow import compute as pc

from raytorch.config.sources import TableData
from raytorch.errors import DataError
from raytorch.sources.files import File, Root
from raytorch.sources.table_columns import Columns
from raytorch.sources.table_files import TableFiles, first_rows, place_of_row
from raytorch.sources.table_statistics import Statistics, as_values

_FEWEST = 5
"""Different numbers that a column has at least, to be taken for one of numbers."""
_FOR_EACH_OTHER = 9
"""Different numbers for each value that is none, in a column of numbers; a single such value may be among fewer."""
_SHOWN = 3
"""Values that are named beside the first."""
_LONGEST = 40


def refuse_text(section: TableData, columns: Columns, root: Root, first: File) -> None:
    """Refuse text that a section has no place for, by the first rows of the training files. Raises DataError."""
    texts = [name for name in columns.features if section.categories == "error" and columns.is_text(name)]
    if not columns.is_classification and columns.is_text(columns.target):
        texts.append(columns.target)
    if not texts:
        return
    rows = first_rows(root, first, texts, section.delimiter)
    for name in texts:
        column = as_values(rows.column(name), pa.large_string())
        if spoiled := _spoiled(columns, name, pc.unique(column)):
            row = _first_of(column, spoiled)
            raise _fault(columns, name, place_of_row(root, first, row), column[row].as_py(), spoiled)
    place, name = root.place(first.name), texts[0]
    told = f"{place}: column {name} is of {columns.types[name]}"
    if name == columns.target:
        raise DataError(f"{told}, which is no number; data.task: regression")
    raise DataError(f"{told}; set data.categories to codes or one_hot, or leave it out: data.ignore")


def refuse_spoiled_numbers(section: TableData, columns: Columns, files: TableFiles, found: Statistics) -> None:
    """Refuse a column of text that is of numbers for the most part, unless its section says that it is of categories.

    Raises DataError.
    """
    is_said = {*columns.categorical, *([columns.target] if section.task else [])}
    for name, values in found.values.items():
        if name in is_said:
            continue
        if spoiled := _spoiled(columns, name, values):
            raise _fault(columns, name, *_first_place(files, name, spoiled), spoiled)


def _spoiled(columns: Columns, name: str, values: Any) -> list[str]:
    """The values of a column of text that are no numbers, if the others are numbers for the most part."""
    if not columns.is_text(name) or pa.types.is_dictionary(columns.types[name]):
        return []
    texts = [text for text in pc.drop_null(values).to_pylist() if text]  # an empty cell is a missing number
    others = [text for text in texts if not _is_number(text, float)]
    alike = sum(_is_number(text, _with_comma) for text in others)
    numbers, rest = len(texts) - len(others) + alike, len(others) - alike
    is_of_numbers = numbers >= _FEWEST and (rest <= 1 or numbers >= _FOR_EACH_OTHER * rest)
    return others if is_of_numbers else []


def _with_comma(text: str) -> float:
    return float(text.replace(",", "."))


def _is_number(text: str, parse: Callable[[str], float]) -> bool:
    try:
        parse(text)
    except ValueError:
        return False
    return True


def _first_of(column: Any, values: list[str]) -> int:
    """The first place of a column that has one of some values; -1 if none has."""
    return int(pc.index(pc.is_in(column, value_set=pa.array(values, column.type)), value=True).as_py())


def _first_place(files: TableFiles, name: str, values: list[str]) -> tuple[str, str]:
    """The first of some values, and where it is."""
    for block in range(len(files.rows)):
        column = as_values(files.read(block, [name]).column(name), pa.large_string())
        row = _first_of(column, values)
        if row >= 0:
            return files.place(block, row), column[row].as_py()
    raise AssertionError(f"column {name} has lost {values}")


def _fault(columns: Columns, name: str, where: str, value: str, spoiled: list[str]) -> DataError:
    others = [repr(each)[:_LONGEST] for each in spoiled if each != value]
    beside = f" (and in other rows {', '.join(others[:_SHOWN])}{', ...' if len(others) > _SHOWN else ''})"
    what = f"column {name}: expected a number, as in most rows, found {value!r:.{_LONGEST}}{beside if others else ''}"
    if _is_number(value, _with_comma):
        return DataError(f"{where}: {what}; write it with a point, and without commas")
    if name == columns.target:
        return DataError(f"{where}: {what}; mend it, or leave the row out; of classes set data.task: classification")
    return DataError(
        f"{where}: {what}; mend it, or leave the cell empty and set data.missing; if these are no numbers but "
        f"categories, name the column in data.categorical"
    )
