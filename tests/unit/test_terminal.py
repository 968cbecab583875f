"""What is printed for a person: tables, and letters that the locale does not have."""

import sys
from io import BytesIO, StringIO, TextIOWrapper

import pytest
from rich.console import Console
from rich.table import Table

from raytorch.cli.main import main
from raytorch.terminal import cell, say_table


def test_a_table_keeps_every_cell_whole_on_its_line_however_narrow_the_terminal_is() -> None:
    name, table = "a-run-of-a-name-that-is-long-" * 8, Table("run", "state", box=None)
    table.add_row(cell(name), "failed: lost_worker")
    table.add_row("b", "finished")
    written = StringIO()
    say_table(Console(file=written, width=40), table)
    lines = written.getvalue().splitlines()
    assert [line.split() for line in lines] == [["run", "state"], [name, "failed:", "lost_worker"], ["b", "finished"]]


def test_a_letter_that_the_locale_does_not_have_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    written = BytesIO()
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(sys, "argv", ["raytorch", "schema"])
    with pytest.raises(SystemExit):
        main()
    print("accuracy 0.9 \N{MIDDLE DOT} 3 epochs", flush=True)
    assert written.getvalue().endswith(b"accuracy 0.9 \\xb7 3 epochs\n")
