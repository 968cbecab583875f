"""What is printed for a person: tables."""

from io import StringIO

from rich.console import Console
from rich.table import Table

from raytorch.terminal import cell, say_table


def test_a_table_keeps_every_cell_whole_on_its_line_however_narrow_the_terminal_is() -> None:
    name, table = "a-run-of-a-name-that-is-long-" * 8, Table("run", "state", box=None)
    table.add_row(cell(name), "failed: lost_worker")
    table.add_row("b", "finished")
    written = StringIO()
    say_table(Console(file=written, width=40), table)
    lines = written.getvalue().splitlines()
    assert [line.split() for line in lines] == [["run", "state"], [name, "failed:", "lost_worker"], ["b", "finished"]]
