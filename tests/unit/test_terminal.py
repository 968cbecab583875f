"""What is printed for a person: tables, and letters that the locale does not have."""

import os
import subprocess
import sys
from io import StringIO

from rich.console import Console
from rich.table import Table

from raytorch.system.terminal import cell, say_table


def test_a_table_keeps_every_cell_whole_on_its_line_however_narrow_the_terminal_is() -> None:
    name, table = "a-run-of-a-name-that-is-long-" * 8, Table("run", "state", box=None)
    table.add_row(cell(name), "failed: lost_worker")
    table.add_row("b", "finished")
    written = StringIO()
    say_table(Console(file=written, width=40), table)
    lines = written.getvalue().splitlines()
    assert [line.split() for line in lines] == [["run", "state"], [name, "failed:", "lost_worker"], ["b", "finished"]]


ASCII_ONLY = """
import sys
from raytorch.cli.main import main
sys.argv = ["raytorch", "schema"]
try:
    main()
except SystemExit:
    print("accuracy 0.9 \\N{MIDDLE DOT} 3 epochs")
"""


def test_a_letter_that_the_locale_does_not_have_is_escaped() -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run([sys.executable, "-c", ASCII_ONLY], env=environment, capture_output=True, check=True)
    assert done.stdout.endswith(b"accuracy 0.9 \\xb7 3 epochs\n")
