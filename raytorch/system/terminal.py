"""Output for a person: text as text. No markup in it is rendered, and nothing in it commands the terminal."""

from typing import TextIO

from rich.console import Console
from rich.segment import Segments
from rich.table import Table
from rich.text import Text

from raytorch.system.safe_text import escaped, escaped_line, escaped_log

_WIDEST = 10_000


def say(console: Console, text: object, style: str = "") -> None:
    """Print a text, whole, to be copied however narrow the terminal is."""
    console.print(Text(escaped(text), style), soft_wrap=True)


def say_part(console: Console, text: object) -> None:
    """Print a part of a text, at once and without the end of a line."""
    console.print(Text(escaped(text)), soft_wrap=True, end="")


def say_labelled(console: Console, label: str, text: object, width: int = 10) -> None:
    """Print what a label says, on one line."""
    console.print(Text(f"{label:<{width}}{escaped_line(text)}"), soft_wrap=True)


def say_table(console: Console, table: Table) -> None:
    """Print a table with every cell whole and on its line, to be copied however narrow the terminal is."""
    for column in table.columns:
        column.no_wrap = True
    wide = console.options.update(width=_WIDEST)
    fitting = wide.update(width=console.measure(table, options=wide).maximum)
    console.print(Segments(console.render(table, fitting)), crop=False, soft_wrap=True, end="")


def cell(text: object, style: str = "") -> Text:
    """A text for a table's cell or title."""
    return Text(escaped_line(text), style)


def pass_on(log: str, stream: TextIO) -> None:
    """Print a piece of a log: to a terminal with its colours but without other commands, elsewhere as it is."""
    stream.write(escaped_log(log) if stream.isatty() else log)
    stream.flush()
