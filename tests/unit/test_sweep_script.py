"""The script that runs a sweep, also as a job on a cluster. No Ray runs here."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from raytorch import sweeps
from raytorch.errors import UserError
from raytorch.runs.storage import BASE

SCRIPT = str(Path(__file__).resolve().parents[2] / "jobs" / "sweep.py")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep's file, in the current folder."""
    monkeypatch.chdir(tmp_path)
    content = {"name": "few", "run": {"epochs": 1}, "parameters": {"optimizer.lr": {"grid": [0.1, 0.2]}}}
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return tmp_path / "few.yaml"


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The sweeps that were to run, each with the command that is told to go on with it."""
    told: list[Any] = []
    monkeypatch.setattr(sweeps, "run_sweep", lambda plan, watch: {"path": str(plan.folder)})
    monkeypatch.setattr(sweeps, "print_sweep", lambda *arguments, resume: told.append((arguments[2]["path"], resume)))
    return told


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["jobs/sweep.py", *arguments])
    runpy.run_path(SCRIPT, run_name="__main__")


@pytest.mark.parametrize("resumed", ["runs/first", "first", "{storage}/first"])
def test_a_submitted_sweep_is_resumed_where_it_is(
    file: Path, ran: list[Any], monkeypatch: pytest.MonkeyPatch, resumed: str
) -> None:
    storage = file.parent / "my storage" / "runs"
    (storage / "first").mkdir(parents=True)
    (storage / "first" / "sweep.yaml").write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setenv(BASE, str(storage))
    run(monkeypatch, "--resume", resumed.format(storage=storage))
    assert ran == [
        (str(storage / "first"), f"raytorch submit jobs/sweep.py --storage '{storage}' -- --resume"),
    ]


def test_a_new_sweep_takes_its_file_and_changes(file: Path, ran: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, "few.yaml", "name=other", "storage=there")
    [(path, command)] = ran
    assert path.startswith(f"{file.parent}/there/other-")
    assert command == "python jobs/sweep.py --resume"


@pytest.mark.parametrize("arguments", [[], ["few.yaml", "--resume", "first"]])
def test_one_of_a_file_and_a_sweep_is_needed(
    file: Path, ran: list[Any], monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, *arguments)
    assert not ran


def test_a_sweep_whose_data_is_not_on_the_cluster_is_refused_at_once(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BASE, str(file.parent))
    monkeypatch.setattr("raytorch.sweeps.sweep.ray_for", None)  # it does not come to this
    with pytest.raises(UserError, match=r"^data\.root: data would be in the job's own folder"):
        run(monkeypatch, "few.yaml", "run.data=mnist")
    assert [path.name for path in file.parent.iterdir()] == ["few.yaml"]
