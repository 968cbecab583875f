"""A rank is killed (SIGKILL) at each stage of a checkpoint that ranks write together, into a folder and into S3."""

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import s3_by_moto
from ranks import on_ranks
from s3_server import S3Process
from sharded_runs import assert_close, flat, in_project, run_of, saved, train, without_ray
from torch.multiprocessing import ProcessExitedException

from raytorch.distributed import Worker
from raytorch.runs.checkpoint_manifest import checkpoint_names, is_complete_checkpoint, latest_checkpoint
from raytorch.runs.local_folder import LocalFolder
from raytorch.runs.storage import RunFolder
from raytorch.training import checkpoint_files, checkpoints
from raytorch.training.checkpoint_writer import Notes

RUN: dict[str, Any] = {
    "optimizer": {"name": "adamw", "lr": 0.01},
    "ema": {"decay": 0.9},
    "steps": 6,
    "checkpoint": {"every_steps": 1, "keep": 1},
}
STAGES: dict[str, tuple[int, Any, str, int]] = {
    "between its files": (1, checkpoint_files, "write_pieces", 6),
    "after its files": (1, Notes, "leave", 3),
    "while another writes": (0, checkpoint_files, "write_pieces", 6),
    "while it waits for another": (0, Notes, "take", 3),
    "before the manifest": (0, checkpoints, "to_json", 3),
    "before it is put in place": (0, Path, "replace", 3),
    "in the upload": (1, RunFolder, "upload", 3),
    "in rank 0's upload": (0, RunFolder, "upload", 3),
}
"""Of each stage the rank that is killed, and which call of what it is killed in, counted from 1."""
IN_A_STORE = ("in the upload", "in rank 0's upload", "after its files", "before the manifest")


@pytest.fixture(scope="module", autouse=True)
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The run that nobody kills, in the current folder."""
    before = Path.cwd()
    in_project(tmp_path_factory.mktemp("killed"))
    on_ranks(partial(follow, "undisturbed", "", "runs"), 2)
    yield
    os.chdir(before)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An S3 server on this machine."""
    folder = tmp_path_factory.mktemp("store")
    (folder / "bucket").mkdir()
    with S3Process(folder, s3_by_moto.__file__) as server:
        yield server.uri("bucket/runs")


def follow(name: str, stage: str, storage: str, worker: Worker) -> None:
    without_ray()
    if stage and STAGES[stage][0] == worker.rank:
        _, owner, call, count = STAGES[stage]
        setattr(owner, call, killed_in(getattr(owner, call), count, stage))
    train(run_of(name, 2, "fsdp", **RUN | {"storage": storage}), worker)


def killed_in(call: Any, count: int, stage: str) -> Any:
    """``call``, in which the process is killed as often as it has been counted."""
    seen = 0

    def counted(*given: Any, **named: Any) -> Any:
        nonlocal seen
        seen += "upload" not in stage or given[-1].startswith("checkpoint_")
        if seen == count:
            if "upload" in stage:  # of which a file has come through
                folder, local, place = given
                first = sorted(each for each in local.iterdir())[0]
                folder.write_bytes(f"{place}/{first.name}", first.read_bytes())
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*given, **named)

    return counted


@pytest.mark.parametrize("stage", [stage for stage in STAGES if "upload" not in stage])
def test_a_killed_rank_leaves_the_last_complete_checkpoint(stage: str) -> None:
    name = stage.replace(" ", "-")
    kill_and_go_on(name, stage, "runs")
    assert [each for each in LocalFolder(f"runs/{name}").folders() if each != "logs"] == ["checkpoint_00000006"]


@pytest.mark.parametrize("stage", IN_A_STORE)
def test_a_rank_that_is_killed_while_it_sends_its_part_leaves_the_last_complete_one(stage: str, store: str) -> None:
    kill_and_go_on(stage.replace(" ", "-").replace("'", ""), stage, store)


def kill_and_go_on(name: str, stage: str, storage: str) -> None:
    """The run loses a rank in the third checkpoint, goes on with new ranks, and comes to what it would have anyway."""
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        on_ranks(partial(follow, name, stage, storage), 2)
    folder = RunFolder(storage, name)
    complete = [each for each in checkpoint_names(folder) if is_complete_checkpoint(folder, each)]
    assert complete[-1] in ("checkpoint_00000001", "checkpoint_00000002")  # as far as rank 0 had come with the second
    on_ranks(partial(follow, name, "", storage), 2)
    assert checkpoint_names(folder) == [latest_checkpoint(folder)] == ["checkpoint_00000006"]
    (model, state), (expected, other) = saved(name, storage), saved("undisturbed")
    assert_close(model, expected, 0)
    for part in ("kept", "averages", "generators"):
        assert_close(flat(state[part]), flat(other[part]), 0)
