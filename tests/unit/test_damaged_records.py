"""Records that are damaged or somebody else's: one clear error or warning, and nothing outside the run is touched.

A short run of each kind by default; a longer one by hand, 20,000 examples and more in all:
``RAYTORCH_EXAMPLES=1200 pytest tests/unit/test_damaged_records.py``.
"""

import json
import logging
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from damage import KEYS, VALUES, damage_file, damage_tree
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from in_process import local_session
from torch import nn

from raytorch.cli.runs import _row
from raytorch.config import RunConfig
from raytorch.config.file import dump_config
from raytorch.errors import RaytorchError
from raytorch.models.networks import Architecture
from raytorch.runs.catalog import list_runs, read_history
from raytorch.runs.checkpoint_manifest import latest_checkpoint, read_manifest
from raytorch.runs.curves import write_report
from raytorch.runs.metrics import MetricsLog
from raytorch.runs.plan import _require_more_to_do, plan_resume, plan_run
from raytorch.runs.storage import LiveFiles, RunFolder
from raytorch.service.job import describe, failure_of, summary_of
from raytorch.session.registry import Registry
from raytorch.session.restore import restore
from raytorch.sweeps.file import load_sweep
from raytorch.sweeps.results import best_config, find_best, results_csv
from raytorch.sweeps.sweep import SweepPlan, _LiveSweepRecord, plan_resumed_sweep, plan_sweep
from raytorch.training.checkpoints import Checkpoints
from raytorch.training.run_record import RunRecord
from raytorch.training.saved_state import open_checkpoint

EXAMPLES = int(os.environ.get("RAYTORCH_EXAMPLES", "12"))
MOST_GROWTH = 500 * 2**20
"""Bytes by which the memory of this process may grow."""
RUN, SWEEP, SESSION = "run", "sweep", "session"
many = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],  # what fails is small already, and to make it smaller takes minutes
)


class Place:
    """A storage with a good run beside the one that is damaged, and a folder outside it that nobody may touch."""

    def __init__(self, root: Path) -> None:
        self.root, self.storage, self.outside = root, root / "storage", root / "outside"
        self.outside.mkdir()
        (self.outside / "precious").write_text("precious\n", encoding="utf-8")
        self.originals = root / "originals"
        config = RunConfig(epochs=9, storage=str(self.storage))
        write_run(config, RUN)
        write_run(config, "good")
        write_sweep(self.storage, root)
        session = local_session()
        net = session.module(nn.Sequential, session.module(nn.Linear, 4, 3), session.module(nn.Dropout, 0.5))
        optimizer = session.optimizer("adam", net.parameters(), lr=0.1)
        net(session.randn(2, 4)).sum().backward()
        optimizer.step()
        session.save(self.storage / SESSION)
        session.close()
        saved = self.storage / SESSION
        if not (saved / "session.json").exists():  # a folder for each rank
            [rank] = [path for path in saved.iterdir() if path.is_dir()]
            rank.rename(root / "rank")
            shutil.rmtree(saved)
            (root / "rank").rename(saved)
        shutil.copytree(self.storage, self.originals)
        self.plan = plan_resume(str(self.storage / RUN))
        self.sweep = plan_resumed_sweep(str(self.storage / SWEEP))
        self.base = memory()

    def restored(self, name: str) -> Path:
        """The folder of that name, whole again, and nothing else but the good run."""
        for path in self.storage.iterdir():
            if path.name != "good":
                shutil.rmtree(path)
        shutil.copytree(self.originals / name, self.storage / name)
        return self.storage / name

    def others(self, name: str) -> dict[str, bytes | None]:
        """All files and folders but those of ``name``."""
        kept = [self.outside, *(path for path in self.storage.iterdir() if path.name != name)]
        found = [path for each in kept for path in [each, *each.rglob("*")]]
        return {str(path): path.read_bytes() if path.is_file() else None for path in found}


def memory() -> int:
    """Bytes that this process has held at most."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def write_run(config: RunConfig, name: str) -> None:
    """A run that has saved a checkpoint, as its driver and its rank 0 leave it."""
    plan = plan_run(config, name)
    folder = plan.folder
    folder.make()
    with RunRecord(plan).writing():
        pass
    summary = json.loads(folder.read_bytes("summary.json")) | {
        "state": "failed",
        "error": {"cause": "error", "rank": 0, "kind": "ValueError", "message": "boom", "traceback": "Traceback"},
        "seconds": {"total": 1.5, "training": 1.0},
        "exports": [{"format": "onnx", "file": "export/model.onnx", "relative_error": 0.0}],
        "metrics": {"accuracy": 0.5, "loss": 0.25},
        "step": 5,
        "epochs": 0.2,
        "samples_per_s": 100.0,
    }
    folder.write_json("summary.json", summary)
    lines = [{"step": step, "epoch": step / 24, "split": "train", "loss": 1.0, "lr": 0.1} for step in range(1, 5)]
    lines.append({"step": 5, "epoch": 0.2, "split": "test", "accuracy": 0.5, "loss": 0.25})
    folder.write_text("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    snapshot = {"checkpoint_results": [{"checkpoint_dir_name": "../outside"}]}
    folder.write_json("checkpoint_manager_snapshot.json", snapshot)
    architecture = Architecture(plan.config.model, (1, 8, 8), 10)
    state = {"optimizer": {"state": [{"step": torch.ones(1)}], "lr": 0.1}, "loader": {"epoch": 0, "position": 5}}
    manifest = {
        "step": 5,
        "epoch": 0.2,
        "metrics": {"accuracy": 0.5, "loss": 0.25},
        "evaluated": True,
        "seconds": {"training": 1.0},
        "config": plan.config.model_dump(mode="json"),
        "versions": {"torch": "2"},
    }
    Checkpoints(folder, 2, config.ranking, lambda: None).save(
        {"model": (architecture.build(), architecture)}, state, manifest
    )


def write_sweep(storage: Path, root: Path) -> None:
    """A sweep with a trial that has finished, and one that was stopped early."""
    file = root / "sweep.yaml"
    file.write_text(
        f"run: {{epochs: 1}}\nstorage: {storage}\nasha: {{}}\ntrials: 2\n"
        "parameters: {optimizer.lr: {log_uniform: [1.0e-4, 1.0e-1]}, model.hidden: {choice: [[8], [16]]}}\n",
        encoding="utf-8",
    )
    plan = plan_sweep(load_sweep(file), SWEEP)
    plan.folder.make()
    with suppress(KeyboardInterrupt), _LiveSweepRecord(plan).writing():
        raise KeyboardInterrupt
    plan.folder.write_json(
        "sweep.json", json.loads(plan.folder.read_bytes("sweep.json")) | {"stopped": {"1": 1.0}, "seconds": 3.5}
    )
    trial = RunFolder(str(plan.folder), "trial-000")
    trial.make()
    trial.write_text("config.yaml", dump_config(plan.sweep.trials[0].config))
    trial.write_json("summary.json", {"state": "finished", "started": "", "seconds": {"total": 1.0}})
    trial.write_text("metrics.jsonl", '{"step": 5, "epoch": 1.0, "split": "test", "accuracy": 0.5, "loss": 0.25}\n')


# -- what reads them back ----------------------------------------------------------------------------------------------


def list_the_runs(place: Place) -> None:
    """Damage to one run is no error, and the good one is listed."""
    try:
        listed = list_runs(str(place.storage))
        assert "good" in [run["name"] for run in listed]
        for run in listed:
            json.dumps(run)
            _row(run, list(run.get("metrics", {})))
    except RaytorchError as error:
        raise AssertionError("the good run is not listed") from error


def resume(place: Place) -> None:
    """What ``train --resume`` reads before it starts, and writes first."""
    plan = plan_resume(str(place.storage / RUN))
    with RunRecord(plan).writing():
        pass


def go_on(place: Place) -> None:
    """What a resumed run reads and writes before it trains."""
    plan = place.plan
    with plan.folder.claimed():
        plan.folder.delete("checkpoint_manager_snapshot.json")
        name = Checkpoints(plan.folder, plan.config.checkpoint.keep, plan.config.ranking, lambda: None).recover()
        if name:
            _require_more_to_do(plan.config, read_manifest(plan.folder, name), "")


def log_on(place: Place) -> None:
    """What a resumed run does with its metrics."""
    with closing(LiveFiles(place.plan.folder)) as files:
        files.extend("metrics.jsonl").close()
        with closing(MetricsLog(files.path, resume_step=5, tensorboard=False)) as log:
            log.write("train", 6, 0.3, {"loss": 1.0})
    assert [line["step"] for line in read_history(place.plan.folder)][-1] == 6


def look_at_the_job(place: Place) -> None:
    """What ``status`` and ``result`` show of a job with this run's folder."""
    show_job({"raytorch_run": str(place.storage / RUN), "raytorch_kind": "train"})


def show_job(metadata: dict[str, Any], **changes: Any) -> None:
    details = {
        "submission_id": "first",
        "metadata": metadata,
        "status": "FAILED",
        "start_time": 1_700_000_000_000,
        "end_time": 1_900_000_000_000,
        "entrypoint": "python",
        "error_type": None,
        "driver_exit_code": None,
        "message": None,
    }
    job = describe(SimpleNamespace(**details | changes), "http://127.0.0.1:8265")
    summary = summary_of(job)
    failure_of(job, SimpleNamespace(**details), summary, "Traceback\nValueError: x")
    datetime.isoformat(job.submitted or datetime.now())


def load_weights(place: Place) -> None:
    folder = RunFolder(str(place.storage), RUN)
    name = latest_checkpoint(folder) or "checkpoint_00000005"
    with open_checkpoint(folder, name) as saved:
        saved.model(torch.device("cpu"))
        saved.state()


def resume_the_sweep(place: Place) -> None:
    """What ``sweep --resume`` reads and writes before and after the trials."""
    go_on_with_the_sweep(place, plan_resumed_sweep(str(place.storage / SWEEP)))


def go_on_with_the_sweep(place: Place, plan: SweepPlan | None = None) -> None:
    plan = plan or place.sweep
    with plan.folder.claimed():
        record = _LiveSweepRecord(plan)
        record.keep()
        results = plan.results(record.stopped)
        json.dumps([result.row() for result in results])
        plan.folder.write_text("results.csv", results_csv(results))
        best = find_best(results, plan.sweep.config.ranking.label)
        if best:
            plan.folder.write_text("best.yaml", best_config(plan.folder, plan.sweep.config, best))


def restore_the_session(place: Place) -> None:
    restore(Registry(), place.storage / SESSION, torch.device("cpu"))


KINDS: list[tuple[str, str, list[Callable[[Place], None]]]] = [
    (RUN, "config.yaml", [list_the_runs, resume]),
    (RUN, "summary.json", [list_the_runs, look_at_the_job]),
    (RUN, "metrics.jsonl", [log_on]),
    (RUN, "checkpoint_manager_snapshot.json", [go_on]),
    (RUN, "checkpoint_00000005/checkpoint.json", [load_weights, go_on]),
    (RUN, "checkpoint_00000005/state.json", [load_weights]),
    (RUN, "checkpoint_00000005/state.safetensors", [load_weights]),
    (RUN, "checkpoint_00000005/model.safetensors", [load_weights]),
    (SWEEP, "sweep.yaml", [resume_the_sweep]),
    (SWEEP, "sweep.json", [go_on_with_the_sweep]),
    (SWEEP, "trial-000/config.yaml", [go_on_with_the_sweep]),
    (SWEEP, "trial-000/summary.json", [go_on_with_the_sweep]),
    (SWEEP, "trial-000/metrics.jsonl", [go_on_with_the_sweep]),
    (SESSION, "session.json", [restore_the_session]),
    (SESSION, "tensors.safetensors", [restore_the_session]),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    logger = logging.getLogger("raytorch")
    logger.disabled = True  # thousands of warnings
    yield Place(tmp_path_factory.mktemp("damaged"))
    logger.disabled = False


@pytest.mark.parametrize(("name", "file", "readers"), KINDS, ids=[f"{kind[0]}/{kind[1]}" for kind in KINDS])
@many
@given(data=st.data())
def test_a_damaged_record_harms_nothing_but_its_run(
    place: Place, name: str, file: str, readers: list[Callable[[Place], None]], data: st.DataObject
) -> None:
    damage_file(data.draw, place.restored(name) / file, place.outside)
    before = place.others(name)
    for read in readers:
        with suppress(RaytorchError):
            read(place)
    assert place.others(name) == before
    assert memory() - place.base < MOST_GROWTH


@many
@given(data=st.data())
def test_a_jobs_details_may_say_anything(place: Place, data: st.DataObject) -> None:
    place.restored(RUN)
    metadata = damage_tree(data.draw, {"raytorch_run": str(place.storage / RUN), "raytorch_kind": "train"})
    changes = {
        key: data.draw(VALUES) for key in data.draw(st.sets(st.sampled_from(["status", "start_time", "message"])))
    }
    before = place.others(RUN)
    with suppress(RaytorchError):
        show_job(metadata, **changes)
    assert place.others(RUN) == before


@settings(many, max_examples=max(3, EXAMPLES // 20))
@given(data=st.data())
def test_damaged_metrics_are_drawn_as_far_as_they_go(place: Place, data: st.DataObject) -> None:
    damage_file(data.draw, place.restored(RUN) / "metrics.jsonl", place.outside)
    with suppress(RaytorchError):
        write_report(RunFolder(str(place.storage), RUN), place.storage / RUN / "x.svg")


@many
@given(name=KEYS)
def test_a_runs_folder_may_have_any_name(place: Place, name: str) -> None:
    place.restored(RUN)
    with suppress(OSError, ValueError):  # of which no folder can be made
        (place.storage / RUN).rename(place.storage / name.replace("/", "-"))
    list_the_runs(place)
