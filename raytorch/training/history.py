"""What a run has measured, as a table."""

from html import escape
from typing import Any

from raytorch.errors import MissingPackageError


class History(list[dict[str, Any]]):
    """The lines of a run's ``metrics.jsonl``, oldest first: a list of dictionaries, which a notebook shows as a table.

    Example:
        >>> history = History([{"step": 20, "split": "test", "loss": 0.25}])
        >>> history.columns
        ['step', 'split', 'loss']
        >>> print(history)
        step  split  loss
        20    test   0.25
    """

    @property
    def columns(self) -> list[str]:
        """The names that any of the lines has, in the order in which they appear."""
        return list(dict.fromkeys(name for line in self for name in line))

    def to_pandas(self) -> Any:
        """The same as a ``pandas.DataFrame``. Raises MissingPackageError where pandas is not installed."""
        try:
            import pandas as pd
        except ModuleNotFoundError:
            raise MissingPackageError("pandas is not installed here: pip install pandas") from None
        return pd.DataFrame(list(self), columns=self.columns)

    def __str__(self) -> str:
        rows = self._rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)

    def _repr_html_(self) -> str:
        head, *rows = self._rows()
        body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        titles = "".join(f"<th>{escape(name)}</th>" for name in head)
        return f"<table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"

    def _rows(self) -> list[list[str]]:
        names = self.columns
        return [names, *([_shown(line.get(name)) for name in names] for line in self)]


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:{'.0f' if abs(value) >= 1e6 else '.6g'}}" if isinstance(value, float) else str(value)
