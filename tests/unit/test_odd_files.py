"""What is in the place of a record and no file, or far too large a one: it is left out, and the rest is read."""

import logging
import os
import socket
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import pytest
import torch
from torch import nn

from raytorch.config import RunConfig
from raytorch.config.file import dump_config
from raytorch.errors import CheckpointError, RecordError
from raytorch.models.networks import Architecture
from raytorch.runs.catalog import list_runs, read_history, read_summary
from raytorch.runs.checkpoint_manifest import latest_checkpoint
from raytorch.runs.plan import plan_resume, plan_run
from raytorch.runs.storage import LARGEST_RECORD, RunFolder
from raytorch.sweeps.file import Trial
from raytorch.sweeps.results import read_result
from raytorch.training.checkpoints import Checkpoints
from raytorch.training.saved_state import open_checkpoint


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server, chdir(path.parent):  # paths of sockets have to be short
        server.bind(path.name)


def make_large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(LARGEST_RECORD + 1)


ODD: dict[str, Callable[[Path], None]] = {
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "socket": make_socket,
    "large": make_large,
}


@pytest.fixture(params=ODD)
def put(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Puts something odd in the place of a file."""

    def put(path: str) -> None:
        Path(path).unlink()
        ODD[request.param](Path(path))

    return put


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run with checkpoints at steps 1 and 2."""
    config = RunConfig.model_validate({"epochs": 1, "storage": str(tmp_path)})
    plan = plan_run(config, "trial-000")
    plan.folder.make()
    plan.folder.write_text("config.yaml", dump_config(plan.config))
    plan.folder.write_json("summary.json", {"state": "finished", "started": ""})
    plan.folder.write_text(
        "metrics.jsonl", '{"step": 1, "epoch": 1.0, "split": "test", "accuracy": 0.5, "loss": 0.2}\n'
    )
    checkpoints = Checkpoints(plan.folder, 2, plan.config.ranking, lambda: None)
    architecture = Architecture(plan.config.model, (1, 2, 2), 2)
    for step in (1, 2):
        manifest = {"step": step, "metrics": {}, "evaluated": False, "config": plan.config.model_dump(mode="json")}
        checkpoints.save({"model": (nn.Linear(2, 2), architecture)}, {"at": torch.ones(step)}, manifest)
    checkpoints.wait()
    return plan.folder


@pytest.mark.parametrize("name", ["checkpoint.json", "model.safetensors", "state.json", "state.safetensors"])
def test_a_checkpoint_with_something_odd_in_it_is_incomplete(
    folder: RunFolder, put: Callable[[str], None], name: str
) -> None:
    put(folder.file(f"checkpoint_00000002/{name}"))
    with pytest.raises(CheckpointError), open_checkpoint(folder, "checkpoint_00000002") as saved:
        [saved.model(torch.device("cpu")), saved.state()]
    assert latest_checkpoint(folder) == "checkpoint_00000001"
    config = plan_resume(str(folder)).config
    assert config.name == "trial-000"
    assert Checkpoints(folder, 2, config.ranking, lambda: None).recover() == "checkpoint_00000001"
    assert [name for name in folder.folders() if name.startswith("checkpoint_")] == ["checkpoint_00000001"]


def test_a_summary_that_is_something_odd_leaves_a_lost_run(folder: RunFolder, put: Callable[[str], None]) -> None:
    put(folder.file("summary.json"))
    assert read_summary(folder)["state"] == "lost"
    assert [run["state"] for run in list_runs(folder.storage)] == ["lost"]


def test_a_configuration_that_is_something_odd_is_one_clear_error(
    folder: RunFolder, put: Callable[[str], None]
) -> None:
    put(folder.file("config.yaml"))
    assert [run["state"] for run in list_runs(folder.storage)] == ["finished"]
    with pytest.raises(RecordError, match=r"config\.yaml (is not a file|has more than)"):
        plan_resume(str(folder))


def test_a_trial_with_something_odd_for_its_metrics_is_read_without_them(
    folder: RunFolder, put: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    put(folder.file("metrics.jsonl"))
    trial = Trial(0, {}, plan_resume(str(folder)).config)
    with caplog.at_level(logging.WARNING, "raytorch"):
        assert read_result(RunFolder(*os.path.split(folder.storage)), trial, False).history == []
        assert read_history(folder) == []
    assert "metrics.jsonl" in caplog.text
