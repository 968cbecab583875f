"""Whole runs on two workers: their numbers against plain PyTorch, what they leave behind, and how they go on."""

import json
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray import cloudpickle
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
from ray.util import placement_group, remove_placement_group
from torch.nn.functional import cross_entropy
from whole_runs import SMALL_RUN, assert_bitwise_equal, plan, weights

from raytorch.config import AdamW, ConstantSchedule, DigitsData, MlpModel
from raytorch.datasets import TrainLoader, load_dataset
from raytorch.errors import ResourceError, RunExistsError
from raytorch.models.networks import Architecture
from raytorch.runs.catalog import list_runs, read_history, read_summary
from raytorch.runs.checkpoint_manifest import latest_checkpoint
from raytorch.runs.plan import RunPlan, WorkerJob, plan_resume
from raytorch.runs.status import RunStatus
from raytorch.runs.storage import RunFolder
from raytorch.training.driver import run_training

pytestmark = pytest.mark.usefixtures("local_ray")

PLAIN = {
    "data": {"name": "digits"},
    "model": {"name": "mlp", "hidden": [32]},
    "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
    "schedule": {"name": "constant"},
    "epochs": None,
}
"""What :func:`plain_pytorch` trains."""
ALONE = {"scaling": {"workers": 1}}
"""What takes half the time to start, where the number of workers is of no matter."""


@pytest.fixture(scope="module")
def finished(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunPlan, dict[str, Any]]:
    """A run that has ended well, with every kind of record, and its summary."""
    logging, storage = {"every_steps": 5, "tensorboard": True}, str(tmp_path_factory.mktemp("finished"))
    run = plan(SMALL_RUN, "records", logging=logging, checkpoint={"keep": 1}, storage=storage)
    return run, run_training(run)


def stop_at(step: int) -> Any:
    """A watcher that presses Ctrl-C when the run has come to ``step``."""
    pressed = False

    def watch(status: RunStatus) -> None:
        nonlocal pressed
        if not pressed and status.progress and status.progress["step"] >= step:
            pressed = True
            raise KeyboardInterrupt

    return watch


def plain_pytorch(steps: int, seed: int) -> dict[str, torch.Tensor]:
    """The same model and data in one process, with the whole batch at once and nothing of raytorch's loop."""
    torch.manual_seed(seed)
    data = load_dataset(DigitsData(), "train", torch.device("cpu"))
    model = Architecture(MlpModel(hidden=[32]), data.input_shape, data.num_classes).build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for [batch], _ in zip(TrainLoader(data, batch_size=64, seed=seed).remaining(), range(steps), strict=False):
        inputs, targets = batch.content
        optimizer.zero_grad()
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return model.state_dict()


def test_two_workers_that_compile_and_accumulate_equal_one_process_with_the_joined_batch(
    small_run: dict[str, Any], compiled: Path
) -> None:
    """Without compile, and with more numbers of workers and of micro-batches, see ``tests/unit/test_batch_loss.py``."""
    run = plan(small_run, "ddp", **PLAIN, steps=20, accumulate=2, compile=True)
    run_training(run)
    assert list(compiled.rglob("*.so"))
    expected = plain_pytorch(steps=20, seed=small_run["seed"])
    for name, tensor in weights(run.folder).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)


def test_two_workers_that_share_a_model_equal_one_process(small_run: dict[str, Any]) -> None:
    """Those of a node, as Ray tells of which node each is; all else is in ``tests/unit/test_sharded_training.py``."""
    run = plan(small_run, "hsdp", **PLAIN, steps=20, parallel={"strategy": "hsdp"})
    run_training(run)
    expected = plain_pytorch(steps=20, seed=small_run["seed"])
    for name, tensor in weights(run.folder).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)


def train_slowly(job: WorkerJob) -> None:
    """Train with a pause after each step, so that there is time to stop in the middle of an epoch."""
    from raytorch.training import loop, worker

    train_step = loop.Trainer.train_step

    def step_and_pause(run: Any, micro_batches: Any) -> None:
        train_step(run, micro_batches)
        time.sleep(0.3)

    loop.Trainer.train_step = step_and_pause  # type: ignore[method-assign]
    worker.train_on_worker(job)


def test_a_run_stopped_by_hand_and_resumed_ends_with_the_same_bits(
    small_run: dict[str, Any], finished: tuple[RunPlan, dict[str, Any]]
) -> None:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    whole, full = finished
    # No loss is reduced within an epoch: workers that agreed only then would come to its end, at step 24.
    parted = plan(small_run, "parted", logging={"every_steps": 10_000, "tensorboard": False})
    stopped = run_training(parted, watch=stop_at(step=3), work=train_slowly)
    assert stopped["state"] == "stopped"
    assert 3 <= stopped["step"] < 24

    resumed = run_training(plan_resume("parted", storage=small_run["storage"]))
    assert resumed["state"] == "finished"
    assert (resumed["step"], resumed["metrics"]) == (full["step"], full["metrics"])
    assert_bitwise_equal(weights(whole.folder), weights(parted.folder))
    steps = [line["step"] for line in read_history(parted.folder) if line["split"] == "train"]
    assert steps == sorted(set(steps))


def test_a_run_leaves_records_that_tell_all(finished: tuple[RunPlan, dict[str, Any]]) -> None:
    run, summary = finished
    folder = Path(run.folder.path)
    assert summary["metrics"]["accuracy"] > 0.8
    assert json.loads((folder / "summary.json").read_text(encoding="utf-8")) == summary
    assert summary["seconds"].keys() == {"startup", "training", "data", "evaluating", "checkpointing", "total"}
    assert summary["seconds"]["total"] >= summary["first_step_s"] >= summary["seconds"]["startup"] > 0
    assert summary["versions"]["torch"] == torch.__version__.partition("+")[0]

    history = read_history(run.folder)
    tests = [line for line in history if line["split"] == "test"]
    assert [line["epoch"] for line in tests] == [1, 2, 3]
    assert tests[-1]["accuracy"] == summary["metrics"]["accuracy"]
    assert list((folder / "tensorboard").glob("events.*"))
    assert "epoch 3.00" in (folder / "logs" / "rank-0.log").read_text(encoding="utf-8")
    assert (folder / "logs" / "rank-1.log").exists()

    kept = [path.name for path in folder.glob("checkpoint_*") if path.is_dir()]
    assert latest_checkpoint(run.folder) in kept
    assert len(kept) <= 2  # the best and the latest
    assert not list(folder.glob(".saving-*"))
    assert [listed["name"] for listed in list_runs(run.config.storage)] == ["records"]


def test_nothing_in_a_checkpoint_is_code(finished: tuple[RunPlan, dict[str, Any]]) -> None:
    run, _ = finished
    checkpoint = Path(run.folder.path) / str(latest_checkpoint(run.folder))
    names = ["checkpoint.json", "model.safetensors", "state.json", "state.safetensors"]
    assert sorted(path.name for path in checkpoint.iterdir()) == names
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    place = {"passes", "ended", "left", "registered", "loader", "lines", "checkpoints"}
    assert state.keys() == {"kept", "averages", "patience", "generators", *place}
    assert state["kept"].keys() == {"optimizer"}


def test_a_run_has_one_driver_at_a_time(small_run: dict[str, Any]) -> None:
    run = plan(small_run, "claimed")
    with run.folder.claimed(), pytest.raises(RunExistsError, match="is being run by another process"):
        run_training(run)


def snapshot_of(ray_version: str, *folders: str) -> str:
    """Ray Train's own list of a run's checkpoints, as runs once left it: all but the last of them are to be deleted."""
    results = [{"checkpoint_dir_name": name, "metrics": {"accuracy": 0.0, "step": 1}} for name in folders]
    lists = ("pending_training_results", "pending_validation_specs", "validated_checkpoint_dir_names")
    lists += ("timed_out_validation_checkpoint_dir_names", "failed_validation_checkpoint_dir_names")
    return json.dumps(
        {
            "ray_version": ray_version,
            "checkpoint_results": results,
            "checkpoint_report_indices": [*range(len(results))],
            "latest_checkpoint_result": results[-1],
            "current_report_index": len(results),
            **{name: [] for name in lists},
        }
    )


def test_half_the_workers_continue_a_run_whose_snapshot_names_a_folder_beside_it(
    finished: tuple[RunPlan, dict[str, Any]], tmp_path: Path
) -> None:
    run, before = finished
    shutil.copytree(run.folder.path, tmp_path / "records")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("all of it", encoding="utf-8")
    snapshot = tmp_path / "records" / CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
    snapshot.write_text(
        snapshot_of(ray.__version__, "../precious", str(latest_checkpoint(run.folder))), encoding="utf-8"
    )

    scaling = run.config.scaling.model_copy(update={"workers": 1})
    changes = {"optimizer": AdamW(lr=0.002, betas=(0.8, 0.99), amsgrad=True), "schedule": ConstantSchedule()}
    narrower = run.config.model_copy(
        update={"storage": str(tmp_path), "epochs": 4, "scaling": scaling, "clip_norm": 1.0, **changes}
    )
    after = run_training(plan_resume("records", narrower))
    assert (after["state"], after["workers"], after["epochs"]) == ("finished", 1, 4)
    assert 3 * after["step"] == 4 * before["step"]
    assert after["seconds"]["training"] > before["seconds"]["training"]  # it went on, and did not begin anew
    assert math.isfinite(after["metrics"]["loss"])
    later = read_history(RunFolder(str(tmp_path), "records"))
    assert {line["lr"] for line in later if line["split"] == "train" and line["step"] > before["step"]} == {0.002}
    assert (tmp_path / "precious" / "thesis.tex").read_text(encoding="utf-8") == "all of it"
    assert not snapshot.exists()


def test_a_watcher_that_fails_ends_the_run(small_run: dict[str, Any]) -> None:
    run = plan(small_run, "watched", **ALONE, epochs=2_000)

    def watch(status: RunStatus) -> None:
        if status.progress:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_training(run, watch=watch)
    summary = read_summary(run.folder)
    assert (summary["state"], summary["error"]["kind"]) == ("failed", "ZeroDivisionError")
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU") != 2:  # its workers make room
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("scaling", "told"),
    [
        ({"workers": 3}, "3 workers with 1 CPU each need 3 CPUs, but this machine has 2; lower scaling.workers or "),
        ({"gpus_per_worker": 1}, "1 workers with 1 GPU each need 1 GPUs, but this machine has 0; lower "),
    ],
)
def test_what_the_machine_can_never_give_is_refused_at_once(
    small_run: dict[str, Any], scaling: dict[str, int], told: str
) -> None:
    if "gpus_per_worker" in scaling and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    run = plan(small_run, "refused", scaling=scaling)
    with pytest.raises(ResourceError, match=f"^{told}"):
        run_training(run)
    assert not run.folder.exists()


def test_a_run_that_waits_for_room_is_stopped_at_once(small_run: dict[str, Any]) -> None:
    reserved = placement_group([{"CPU": 1}])
    ray.get(reserved.ready())

    def press_ctrl_c(status: RunStatus) -> None:
        if not status.stopping:
            raise KeyboardInterrupt

    run = plan(small_run, "waiting")
    summary = run_training(run, watch=press_ctrl_c)
    remove_placement_group(reserved)
    assert summary["state"] == read_summary(run.folder)["state"] == "stopped"
    assert latest_checkpoint(run.folder) is None
