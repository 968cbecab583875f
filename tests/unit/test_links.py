"""Links that others have put into a run's folder: nothing is written, read or deleted through them."""

import json
import os
import re
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from raytorch.cli.main import app
from raytorch.config import RunConfig
from raytorch.config.file import dump_config
from raytorch.errors import CheckpointError, RaytorchError, RunNotFoundError, UserError
from raytorch.runs.catalog import list_runs
from raytorch.runs.checkpoint_manifest import (
    CHECKPOINT_FORMAT,
    is_complete_checkpoint,
    latest_checkpoint,
    read_manifest,
)
from raytorch.runs.metrics import MetricsLog, log_to_file
from raytorch.runs.plan import RunPlan, plan_resume, plan_run
from raytorch.runs.storage import LiveFiles, RunFolder
from raytorch.service.script import ScriptRun
from raytorch.training.run_record import RunRecord

PRECIOUS = "precious\n"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder beside the storage, with a file and a folder in it that have nothing to do with runs."""
    folder = tmp_path / "outside"
    (folder / "inner").mkdir(parents=True)
    (folder / "file").write_text(PRECIOUS, encoding="utf-8")
    return folder


@pytest.fixture
def plan(tmp_path: Path) -> RunPlan:
    plan = plan_run(RunConfig(epochs=1, storage=str(tmp_path / "runs")), "mine")
    plan.folder.make()
    plan.folder.write_text("config.yaml", dump_config(plan.config))
    return plan


def unharmed(outside: Path) -> bool:
    return (outside / "file").read_text(encoding="utf-8") == PRECIOUS and sorted(
        str(path.relative_to(outside)) for path in outside.rglob("*")
    ) == ["file", "inner"]


def claim(plan: RunPlan) -> None:
    with plan.folder.claimed():
        pass


def record(plan: RunPlan) -> None:
    with RunRecord(plan).writing():
        pass


def log_metrics(plan: RunPlan) -> None:
    if not plan.folder.exists("metrics.jsonl"):
        plan.folder.write_text("metrics.jsonl", '{"step": 1, "epoch": 0.1, "split": "train"}\n')
    with closing(LiveFiles(plan.folder)) as files:
        files.extend("metrics.jsonl").close()
        with closing(MetricsLog(files.path, resume_step=1)) as log:
            log.write("train", 2, 0.1, {"loss": 1.0})


def log_rank(plan: RunPlan) -> None:
    with closing(LiveFiles(plan.folder)) as files, log_to_file(files.extend("logs/rank-0.log")) as log:
        log.info("a line")


def export(plan: RunPlan) -> None:
    with closing(LiveFiles(plan.folder)) as files:
        (files.make("export") / "model.onnx").write_text("", encoding="utf-8")


def run_script(plan: RunPlan) -> None:
    plan.folder.delete("config.yaml")
    script = Path(plan.config.storage, "script.py")
    script.write_text("print('output')", encoding="utf-8")
    ScriptRun(plan.folder, ["python", str(script)]).run()


WRITERS: list[tuple[Callable[[RunPlan], Any], str]] = [
    (claim, ".lock"),
    (record, "config.yaml"),
    (record, "config.yaml.partial"),
    (record, "summary.json"),
    (record, "summary.json.partial"),
    (log_metrics, "metrics.jsonl"),
    (log_metrics, "metrics.partial"),
    (log_rank, "logs/rank-0.log"),
    (run_script, "summary.json.partial"),
    (run_script, "logs/driver.log"),
    (run_script, ".lock"),
]


@pytest.mark.parametrize(("write", "name"), WRITERS)
@pytest.mark.parametrize("make_link", [os.symlink, os.link])
def test_a_link_to_a_file_is_not_written_through(
    plan: RunPlan, outside: Path, write: Callable[[RunPlan], Any], name: str, make_link: Callable[[Path, str], None]
) -> None:
    place = plan.folder.file(name)
    Path(place).parent.mkdir(exist_ok=True)
    Path(place).unlink(missing_ok=True)
    make_link(outside / "file", place)
    with suppress(UserError):  # where it is not simply replaced
        write(plan)
    assert unharmed(outside)


@pytest.mark.parametrize("make_link", [os.symlink, os.link])
def test_an_end_is_not_written_over_what_a_link_leads_to(
    plan: RunPlan, outside: Path, make_link: Callable[[Path, str], None]
) -> None:
    make_link(outside / "file", plan.folder.file("summary.json"))
    with suppress(UserError):
        assert not plan.folder.write_over("summary.json", [b"{}"])
    assert unharmed(outside)


@pytest.mark.parametrize(
    ("write", "name"),
    [(log_rank, "logs"), (run_script, "logs"), (log_metrics, "tensorboard"), (export, "export")],
)
def test_a_link_to_a_folder_is_not_written_through(
    plan: RunPlan, outside: Path, write: Callable[[RunPlan], Any], name: str
) -> None:
    place = plan.folder.file(name)
    Path(place).symlink_to(outside / "inner")
    with pytest.raises(UserError) as failure:
        write(plan)
    assert str(failure.value) == f"{place} is a link, which is not followed; put in its place what it leads to"
    assert unharmed(outside)


@pytest.mark.parametrize("write", [claim, record, log_metrics, log_rank, export])
def test_a_runs_folder_that_is_a_link_is_not_written_to(
    tmp_path: Path, outside: Path, write: Callable[[RunPlan], Any]
) -> None:
    (tmp_path / "runs").mkdir()
    place = tmp_path / "runs" / "mine"
    place.symlink_to(outside / "inner")
    plan = RunPlan(RunConfig(name="mine", epochs=1, storage=str(tmp_path / "runs")))
    with pytest.raises(UserError) as failure:
        write(plan)
    assert str(failure.value) == f"{place} is a link, which is not followed; put in its place what it leads to"
    assert unharmed(outside)


def test_a_storage_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    plan = plan_run(RunConfig(epochs=1, storage=str(tmp_path / "runs")), "mine")
    claim(plan)
    record(plan)
    assert (tmp_path / "disk/mine/summary.json").exists()
    assert [run["name"] for run in list_runs(str(tmp_path / "runs"))] == ["mine"]


def test_files_appear_with_the_permissions_that_the_umask_leaves(plan: RunPlan) -> None:
    before = os.umask(0o027)
    try:
        record(plan)
        log_rank(plan)
    finally:
        os.umask(before)
    for name in ("summary.json", "logs/rank-0.log"):
        assert Path(plan.folder.file(name)).stat().st_mode & 0o777 == 0o640


def test_what_a_killed_writer_left_goes_when_the_run_is_claimed(plan: RunPlan) -> None:
    left = Path(plan.folder.file(f".summary.json.{'0123456789abcdef'}.partial"))
    other = Path(plan.folder.file(".notes.partial"))
    for path in (left, other):
        path.write_text("{", encoding="utf-8")
    claim(plan)
    assert (left.exists(), other.exists()) == (False, True)


# -- deleting and reading ----------------------------------------------------------------------------------------------


def test_a_link_is_deleted_not_what_it_leads_to(plan: RunPlan, outside: Path) -> None:
    for name, target in (("a", "file"), ("b", "inner")):
        Path(plan.folder.file(name)).symlink_to(outside / target)
        plan.folder.delete(name)
        assert not Path(plan.folder.file(name)).is_symlink()
    Path(plan.folder.file("c")).symlink_to(outside)
    with pytest.raises(UserError, match=r"/c is a link"):
        plan.folder.delete("c/file")
    assert unharmed(outside)


@pytest.mark.parametrize("name", ["../outside/file", "/etc/passwd", "a/../../x", "./x", "a//b", "a/."])
def test_a_name_that_leads_out_of_the_folder_is_refused(plan: RunPlan, outside: Path, name: str) -> None:
    folder = plan.folder
    calls: list[Callable[[], Any]] = [
        lambda: folder.delete(name),
        lambda: folder.write_text(name, ""),
        lambda: folder.read_bytes(name).decode(),
        lambda: folder.exists(name),
        lambda: folder.size(name),
    ]
    for call in calls:
        with pytest.raises(UserError, match=r"names nothing in .*/runs/mine"):
            call()
    assert unharmed(outside)


def checkpoint(files: Any) -> str:
    """The manifest of a checkpoint that lists these files."""
    return json.dumps({"format": CHECKPOINT_FORMAT, "step": 1, "files": files})


@pytest.mark.usefixtures("outside")
@pytest.mark.parametrize("files", [{"../../outside/file": 9}, {"/etc/hostname": 1}, {"": 0}, None])
def test_a_checkpoint_names_files_of_its_own_alone(plan: RunPlan, files: Any) -> None:
    plan.folder.write_text("checkpoint_00000001/checkpoint.json", checkpoint(files))
    assert latest_checkpoint(plan.folder) is None
    with pytest.raises(CheckpointError, match=r"checkpoint\.json is damaged, or none of raytorch's: files"):
        read_manifest(plan.folder, "checkpoint_00000001")


@pytest.mark.parametrize("name", ["checkpoint_notes", "checkpoint_1", "checkpoint_00000002\n", "checkpoint_0000000x"])
def test_a_folder_of_another_name_is_no_checkpoint(plan: RunPlan, name: str) -> None:
    plan.folder.write_text(f"{name}/checkpoint.json", checkpoint({}))
    assert is_complete_checkpoint(plan.folder, name)
    assert latest_checkpoint(plan.folder) is None


def test_a_checkpoint_that_is_a_link_does_not_count(plan: RunPlan, outside: Path) -> None:
    (outside / "inner" / "checkpoint.json").write_text(checkpoint({}), encoding="utf-8")
    Path(plan.folder.file("checkpoint_00000001")).symlink_to(outside / "inner")
    assert latest_checkpoint(plan.folder) is None


def test_a_configuration_is_not_read_through_a_link(plan: RunPlan, outside: Path) -> None:
    place = Path(plan.folder.file("config.yaml"))
    place.unlink()
    place.symlink_to(outside / "file")
    with pytest.raises(RaytorchError) as failure:
        plan_resume(str(plan.folder))
    assert str(failure.value) == f"{place} is a link, which is not followed; put in its place what it leads to"


def test_a_link_in_a_storage_is_told_unless_it_leads_to_another_run_of_it(
    plan: RunPlan, outside: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    record(plan)
    storage = Path(plan.config.storage)
    (storage / "latest").symlink_to(storage / "mine")
    (storage / "away").symlink_to(outside)
    listed = CliRunner().invoke(app, ["runs", "--storage", str(storage)])
    assert listed.exit_code == 0
    assert [line.split()[0] for line in listed.output.splitlines() if not line.startswith("/")] == ["run", "mine"]


def test_a_folder_that_names_a_run_outside_is_none(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    for folder in (tmp_path, tmp_path / "runs"):
        (folder / "config.yaml").write_text("epochs: 1", encoding="utf-8")
    for run in ("..", ".", ""):
        with pytest.raises(RunNotFoundError, match=f"^no run {re.escape(run)} in "):
            plan_resume(run, storage=str(tmp_path / "runs"))
    assert RunFolder(str(tmp_path), "x").folders() == []


def test_a_link_that_leads_in_a_circle_hides_no_run(plan: RunPlan) -> None:
    storage = Path(plan.config.storage)
    record(plan)
    (storage / "circle").symlink_to("circle")
    assert [run["name"] for run in list_runs(str(storage))] == [plan.config.name]
