"""Text that somebody else wrote, in names, records, jobs and logs, is shown as text."""

import ast
import io
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

import raytorch
from raytorch.cli.main import app
from raytorch.cli.progress import ProgressDisplay, print_summary
from raytorch.config.file import load_config
from raytorch.errors import ConfigError
from raytorch.runs.curves import write_report
from raytorch.runs.storage import RunFolder
from raytorch.scaling.table import results_table
from raytorch.service.http import readable
from raytorch.service.job import Job, JobFailure
from raytorch.service.projects import shown
from raytorch.sweeps.file import load_sweep
from raytorch.sweeps.live_table import print_sweep
from raytorch.system.safe_text import escaped, escaped_line, escaped_log
from raytorch.system.terminal import pass_on

TITLE, CLEAR = "\x1b]0;owned\x07", "\x1b[2J"
HOSTILE = f"[/red][bold]:smile: {TITLE}{CLEAR}\x9b31m\r\x08 \u202e right"
"""Markup that Rich would stumble over and render, and what a terminal takes for commands."""
SAFE = r"[/red][bold]:smile: \x1b]0;owned\x07\x1b[2J\x9b31m\r\x08 \u202e right"


def commands_in(text: str) -> set[str]:
    """What of ``text`` a terminal could take for a command."""
    return {letter for letter in text if letter != "\n" and not letter.isprintable()}


# -- the door ----------------------------------------------------------------------------------------------------------


def test_commands_are_escaped_and_letters_kept() -> None:
    assert escaped(HOSTILE) == SAFE
    assert escaped("größer 日本語 😀\ttab\nline") == "größer 日本語 😀\ttab\nline"
    assert escaped_line("two\nlines\t") == r"two\nlines\t"
    assert escaped("half \udcff") == r"half \udcff"


def test_names_of_files_and_words_of_servers_are_escaped_in_the_same_way() -> None:
    assert shown(f"größer\u00a0日本語 {HOSTILE}\n") == f"größer\u00a0日本語 {SAFE}\\n"
    assert shown(os.fsdecode(b"caf\xe9")) == r"caf\xe9"
    assert readable(f"größer\u00a0日本語\n{HOSTILE}") == f"größer\u00a0日本語\n{SAFE}"
    assert readable("http://key:secret@host") == "http://***@host"


def test_a_log_keeps_its_colours_and_progress_bars_on_a_terminal() -> None:
    colours = "\x1b[36m(pid=1)\x1b[0m 10%\r20%\r\n"
    assert escaped_log(colours) == colours
    assert escaped_log(f"{TITLE}{CLEAR}\x1b[31;1mred") == "\\x1b]0;owned\\x07\\x1b[2J\x1b[31;1mred"


@pytest.mark.parametrize(("terminal", "written"), [(True, "\\x1b]0;owned\\x07"), (False, TITLE)])
def test_a_log_goes_into_a_pipe_as_it_is(terminal: bool, written: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    pass_on(TITLE, stream)
    assert stream.getvalue() == written


def test_nothing_is_printed_past_the_door() -> None:
    """Rich renders markup in every text that it is given bare: tables are printed, and texts through ``say``."""
    found = []
    for path in Path(raytorch.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "print":
                [printed, *_] = node.args
                called = ast.unparse(printed)
                if path.name != "terminal.py" and "table" not in called:
                    found.append(f"{path.name}: {called}")
    assert found == []


# -- who shows what ----------------------------------------------------------------------------------------------------


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, color_system=None, width=500)


def said(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_runs_are_listed_whatever_their_records_say(tmp_path: Path) -> None:
    place = tmp_path / "a[red]\x1b]0;owned\x07"
    place.mkdir()
    summary = {
        "name": HOSTILE,
        "path": HOSTILE,
        "state": "failed",
        "started": "2026-01-01",
        "error": {"cause": HOSTILE, "message": HOSTILE},
    }
    (place / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    listed = CliRunner().invoke(app, ["runs", "--storage", str(tmp_path)])
    assert listed.exit_code == 0
    assert commands_in(listed.output) == set()
    assert r"a[red]\x1b]0;own" in listed.output


def job(**changes: Any) -> Job:
    made = Job(
        id="first",
        name=HOSTILE,
        kind="script",
        state="failed",
        run=f"/runs/{HOSTILE}",
        submitted=datetime(2026, 1, 1, tzinfo=UTC),
        started=None,
        ended=datetime(2026, 1, 1, tzinfo=UTC),
        digest=HOSTILE,
        address="http://127.0.0.1:8265",
        entrypoint=HOSTILE,
        failure=JobFailure("error", HOSTILE, 1, f"Traceback\n  {HOSTILE}", HOSTILE),
    )
    return replace(made, **changes)


class Cluster:
    """What the commands ask of a client, told by a hostile cluster."""

    address = f"http://{HOSTILE}"

    def __init__(self, address: str | None = None) -> None:
        pass

    def jobs(self) -> list[Job]:
        return [job(id=HOSTILE)]

    def status(self, job_id: str) -> Job:
        return job()

    def result(self, job_id: str) -> dict[str, Any]:
        return {"state": "finished", "path": f"/runs/{HOSTILE}", "step": 1, "epochs": 1.0, "seconds": {"total": 1.0}}

    def wait(self, job_id: str) -> Job:
        return job()

    def follow(self, job_id: str, rank: int | None = None) -> Iterator[str]:
        yield HOSTILE


@pytest.mark.parametrize("command", [["jobs"], ["status", "first"], ["result", "first"]])
def test_jobs_are_shown_whatever_the_cluster_says(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raytorch.service.client.Client", Cluster)
    listed = CliRunner().invoke(app, command)
    assert listed.exit_code == 0
    assert commands_in(listed.output) == set()
    assert "[/red][bold]:smile:" in listed.output


def test_a_path_that_is_to_be_copied_is_one_word_to_a_shell(console: Console) -> None:
    path = "/runs/$(rm -rf ~); x"
    print_summary(console, {"state": "stopped", "path": path, "seconds": {"total": 1.0}})
    assert said(console).splitlines()[1:] == [
        f"run       {path}",
        f"curves    raytorch report '{path}'",
        f"continue  raytorch train --resume '{path}'",
    ]


def test_a_run_shows_what_its_workers_tell_as_text(console: Console) -> None:
    class News:
        attempts, stopping, evaluations = 1, False, ()
        progress = {"phase": "[/red][bold]", "step": 1, "total_steps": 2}  # noqa: RUF012

    with ProgressDisplay(console, "[/red][bold]") as display:
        display(News())
        display.refresh()
    assert said(console).count("[/red][bold]") >= 2


def test_a_sweeps_parameters_and_errors_are_text(console: Console, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(
        "run: {epochs: 1, data: {name: mnist}}\nparameters: {data.root: {grid: ['[/red][bold]', 'b']}}\n",
        encoding="utf-8",
    )
    sweep = load_sweep(tmp_path / "sweep.yaml")
    rows = [{"trial": trial.name, "state": "failed", "error": HOSTILE} for trial in sweep.trials]
    summary = {"best": None, "path": "/runs/x y", "trials": rows, "seconds": 1.0, "state": "stopped"}
    print_sweep(console, sweep.trials, summary)
    assert commands_in(said(console)) == set()
    assert said(console).count("[/red][bold]") == 3
    assert "raytorch sweep --resume '/runs/x y'" in said(console)


def test_a_studys_device_is_text(console: Console) -> None:
    console.print(results_table({"name": "x", "mode": "weak", "device": HOSTILE, "precision": "bf16", "sizes": []}))
    assert commands_in(said(console)) == set()
    assert "[/red][bold]:smile:" in said(console)


def test_a_picture_takes_a_name_for_no_formula(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), r"a$\frac{$")
    folder.make()
    folder.write_text("metrics.jsonl", '{"step": 1, "epoch": 0.1, "split": "train", "loss": 1.0}\n')
    assert Path(write_report(folder, tmp_path / "x.png")).exists()


def test_an_error_quotes_a_file_as_text(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"epochs: {json.dumps(HOSTILE)}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as failure:
        load_config(path)
    assert commands_in(str(failure.value)) == set()
    shown_one = CliRunner().invoke(app, ["validate", str(path)])
    assert commands_in(str(shown_one.exception)) == set()


def test_a_warning_quotes_a_file_as_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "x\x1b]0;owned\x07"
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps({"state": HOSTILE, "started": ""}), encoding="utf-8")
    with caplog.at_level(logging.WARNING, "raytorch"):
        CliRunner().invoke(app, ["runs", "--storage", str(tmp_path)])
    [told] = [record.getMessage() for record in caplog.records]
    assert commands_in(told) == set()
    assert r"x\x1b]0;owned\x07/summary.json is damaged" in told
