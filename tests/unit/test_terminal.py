"""What is printed for a person: tables, and letters that the locale does not have."""

import os
import pickle
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

import raytorch
from raytorch.cli import main
from raytorch.cli.common import worded
from raytorch.cluster import ray_watch
from raytorch.errors import RaytorchError, Remedy, RunExistsError, TrainingError, UserError
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


@pytest.mark.parametrize("option", ["--version", "-v", "-vv", "-q", "-vq", "-h"])
def test_what_is_told_is_chosen_before_the_command(option: str, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "summary.json").write_text("{", encoding="utf-8")
    command = [Path(sys.executable).with_name("raytorch"), option, "runs", "--storage", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if option == "--version":
        assert (done.returncode, done.stdout, done.stderr) == (0, f"raytorch {raytorch.__version__}\n", "")
    elif option == "-q":
        assert (done.returncode, done.stderr) == (0, "")
    elif option.startswith("-v") and "q" not in option:
        assert done.returncode == 0
        assert "WARNING" in done.stderr
    else:
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1


def test_what_waits_for_a_lost_ray_keeps_the_command_from_nothing() -> None:
    script = """
import sys, threading, time
from raytorch.cli import main
from raytorch.cluster import ray_watch
from raytorch.errors import TrainingError

def lose(**_):
    ray_watch.lost.set()
    raise TrainingError("it is lost")

main.app = lose
threading.Thread(target=time.sleep, args=(600,)).start()
main.main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "it is lost\n")


def test_what_was_lost_before_a_command_does_not_end_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    ray_watch.lost.set()
    monkeypatch.setattr("sys.argv", ["raytorch", "report", "nothing-of-that-name"])
    with pytest.raises(SystemExit, match="2"):
        main.main()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (UserError("no"), "no"),
        (UserError("no", remedies=[Remedy("out")]), "no (--out)"),
        (UserError("no", remedies=[Remedy("list_runs", "/x/a b")]), "no (raytorch runs --storage '/x/a b')"),
        (UserError("no", remedies=[Remedy("jobs")]), "no (raytorch jobs)"),
        (UserError("no", remedies=[Remedy("follow", "first")]), "no (raytorch logs -f first)"),
        (UserError("no", remedies=[Remedy("prepare", "x", "mnist")]), "no (raytorch data prepare mnist --root x)"),
        (
            RunExistsError("no", remedies=[Remedy("name"), Remedy("resume", "/x/a b")]),
            "no (--name or {train} '/x/a b')",
        ),
        (TrainingError("no\nlogs: x", remedies=[Remedy("resume", "/x/y", "sweep")]), "no\nlogs: x\ntry: {sweep} /x/y"),
        (TrainingError("no\nlogs: x", remedies=[Remedy("resume", "/x/y")]), "no\nlogs: x\ntry: {train} /x/y"),
    ],
)
@pytest.mark.parametrize("in_job", [False, True])
def test_the_command_line_words_what_may_be_given_another_time(
    error: RaytorchError, told: str, in_job: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if in_job:
        monkeypatch.setenv("RAYTORCH_STORAGE_BASE", "/x")
    train = f"raytorch {'submit' if in_job else 'train'} --resume"
    assert worded(pickle.loads(pickle.dumps(error))) == told.format(train=train, sweep="raytorch sweep --resume")
