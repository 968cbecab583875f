"""What the worker group needs of Ray's internals: these fail loudly when a new Ray changes it."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train
from ray import cloudpickle
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util import placement_group, placement_group_table, remove_placement_group
from whole_runs import plan

from raytorch.cluster.worker_group import (
    ProcessGroupConfig,
    WorkerGroupController,
    WorkerGroupTrainer,
    forget_snapshot,
    free_abandoned_resources,
)
from raytorch.runs.catalog import read_summary
from raytorch.runs.status import RunStatus
from raytorch.runs.storage import RunFolder
from raytorch.training.driver import run_training


class TorchInController(ray.train.UserCallback):
    """Runs in the controller; writes there which heavy packages it has imported."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def after_report(self, run_context: Any, metrics: list[Any], checkpoint: Any) -> None:
        self.out.write_text(" ".join(sorted({"torch", "ray"} & sys.modules.keys())), encoding="utf-8")


def look_around(job: dict[str, Any]) -> None:
    """Write down what a worker finds when its function begins."""
    import torch
    import torch.distributed as dist

    rank = dist.get_rank()
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK")
    found = [dist.get_backend(), str(dist.get_world_size()), str(total.item()), *(os.environ[name] for name in names)]
    assert os.environ["MASTER_ADDR"]
    assert int(os.environ["MASTER_PORT"]) > 0
    Path(job["out"], f"rank-{rank}").write_text(" ".join(found), encoding="utf-8")
    ray.train.report({"rank": rank})


def build(out: Path) -> WorkerGroupTrainer:
    return WorkerGroupTrainer(
        look_around,
        train_loop_config={"out": str(out)},
        backend_config=ProcessGroupConfig("gloo", timeout_s=60),
        scaling_config=ray.train.ScalingConfig(num_workers=2),
        run_config=ray.train.RunConfig(
            name="look", storage_path=str(out / "storage"), callbacks=[TorchInController(out / "controller")]
        ),
    )


@pytest.mark.usefixtures("local_ray")
def test_the_callbacks_that_are_left_out_are_rays_default(tmp_path: Path) -> None:
    ours = {type(callback) for callback in build(tmp_path)._create_default_callbacks()}
    rays = {type(callback) for callback in DataParallelTrainer._create_default_callbacks(build(tmp_path))}
    assert rays - ours == {DatasetsCallback, PlacementGroupCleanerCallback}
    assert ours < rays


@pytest.mark.usefixtures("local_ray")
def test_workers_share_a_gloo_group_and_the_controller_imports_no_torch(tmp_path: Path) -> None:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    build(tmp_path).fit()
    for rank in (0, 1):
        assert (tmp_path / f"rank-{rank}").read_text(encoding="utf-8") == f"gloo 2 3.0 {rank} 2 {rank} 2 0"
    assert (tmp_path / "controller").read_text(encoding="utf-8") == "ray"


def hold_a_cpu(name: str) -> tuple[Any, Any]:
    """An actor of a class of that name which has reserved a CPU, and what it has reserved."""

    def reserve(self: Any) -> Any:
        reserved = placement_group([{"CPU": 1}])
        ray.get(reserved.ready())
        return reserved

    actor = ray.remote(num_cpus=0)(type(name, (), {"reserve": reserve})).remote()
    return actor, ray.get(actor.reserve.remote())


def reserved_cpus(state: str = "CREATED") -> int:
    return [group["state"] for group in placement_group_table().values()].count(state)


def controllers() -> set[str]:
    """The controllers that have not ended, by their ids."""
    actors = [actor for actor in ray._private.state.actors().values() if actor["State"] != "DEAD"]
    return {actor["ActorID"] for actor in actors if actor["ActorClassName"] == WorkerGroupController.__name__}


@pytest.fixture
def one_cpu_taken(local_ray: None) -> Iterator[None]:
    """One of the two CPUs is not to be had."""
    taken = placement_group([{"CPU": 1}])
    assert taken.wait(30)
    yield
    remove_placement_group(taken)


@pytest.mark.usefixtures("one_cpu_taken")
@pytest.mark.parametrize(("error", "state"), [(None, "stopped"), (KeyboardInterrupt, "stopped"), (OSError, "failed")])
def test_nothing_waits_for_workers_after_a_run_that_was_left_while_it_did(
    small_run: dict[str, Any], error: type[BaseException] | None, state: str
) -> None:
    before = controllers()

    def watch(status: RunStatus) -> bool:
        """End the run when it waits for its second CPU: ask it to stop, press Ctrl-C again and again, or fail."""
        waiting = reserved_cpus("PENDING") > 0
        assert not waiting or controllers() > before
        if waiting and error:
            raise error
        return waiting

    run = plan(small_run, "waiting")
    with pytest.raises(error) if error else nullcontext():
        run_training(run, watch=watch)
    assert read_summary(run.folder)["state"] == state
    assert controllers() <= before
    assert reserved_cpus("PENDING") == 0


@pytest.mark.usefixtures("local_ray")
def test_resources_of_a_controller_that_was_killed_are_freed_and_no_others() -> None:
    holding = [hold_a_cpu(name) for name in ("WorkerGroupController", "SomethingElse")]
    free_abandoned_resources()
    assert reserved_cpus() == 2
    for actor, _ in holding:
        ray.kill(actor)
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(actor.reserve.remote())
    deadline = time.monotonic() + 60
    while reserved_cpus() == 2:
        assert time.monotonic() < deadline
        free_abandoned_resources()
    free_abandoned_resources()
    assert reserved_cpus() == 1
    remove_placement_group(holding[1][1])


def test_the_driver_imports_no_torch(tmp_path: Path) -> None:
    code = f"""
import sys
from raytorch.config import RunConfig
from raytorch.runs.plan import WorkerJob, plan_run
from raytorch.training.driver import _build_trainer, _train_on_worker
plan = plan_run(RunConfig(epochs=1, storage={str(tmp_path)!r}), "mine")
_build_trainer(WorkerJob(plan, monitor=None), _train_on_worker)
print(sorted({{"torch", "torchvision", "safetensors", "ray"}} & sys.modules.keys()))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout == "['ray']\n", result.stderr


# -- the snapshot ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", '{"checkpoint_results": [{"checkpoint_dir_name": "../precious"}]}'])
def test_a_snapshot_is_deleted_and_nothing_that_it_names(tmp_path: Path, text: str) -> None:
    folder = RunFolder(str(tmp_path), "mine")
    (tmp_path / "precious").mkdir()
    folder.make()
    folder.write_text(CHECKPOINT_MANAGER_SNAPSHOT_FILENAME, text)
    forget_snapshot(folder)
    assert not folder.exists(CHECKPOINT_MANAGER_SNAPSHOT_FILENAME)
    forget_snapshot(folder)  # that of a run which has none
    assert (tmp_path / "precious").exists()


@pytest.mark.parametrize("name", ["checkpoint_manager_snapshot.json", ".validate_storage_marker"])
def test_a_link_in_place_of_a_snapshot_is_deleted_alone(tmp_path: Path, name: str) -> None:
    folder = RunFolder(str(tmp_path), "mine")
    precious = tmp_path / "precious"
    precious.write_text("{}", encoding="utf-8")
    Path(folder.path).mkdir()
    Path(folder.file(name)).symlink_to(precious)
    forget_snapshot(folder)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "precious"]
