"""What a person sees of a run that is judged by samples apart from the test split, and of a sweep of such runs."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from run_folders import started
from typer.testing import CliRunner

import raytorch
from raytorch.cli.main import app
from raytorch.cli.progress import print_summary
from raytorch.config import RunConfig, Validation
from raytorch.runs.catalog import read_summary
from raytorch.runs.plan import plan_run
from raytorch.runs.status import Evaluation, RunStatus
from raytorch.runs.storage import RunFolder
from raytorch.sweeps.file import Trial
from raytorch.sweeps.live_table import print_sweep
from raytorch.sweeps.results import find_best, read_result, results_csv
from raytorch.training.run_record import RunRecord

SUMMARY = {
    "name": "mine",
    "path": "/data/runs/mine",
    "state": "finished",
    "started": "2026-01-02T03:04:05+00:00",
    "split": "validation",
    "metrics": {"accuracy": 0.75},
    "test_metrics": {"accuracy": 0.5},
}


def test_the_end_line_has_both() -> None:
    console = Console(file=io.StringIO(), width=120, color_system=None)
    print_summary(console, SUMMARY)
    assert console.file.getvalue().startswith("validation accuracy 0.7500  ·  test accuracy 0.5000\n")  # type: ignore[attr-defined]


def test_runs_are_listed_by_split_if_one_is_judged_by_validation(tmp_path: Path) -> None:
    def listed() -> list[list[str]]:
        answer = CliRunner().invoke(app, ["runs", "--storage", str(tmp_path)], env={"COLUMNS": "150"})
        return [line.split() for line in answer.output.splitlines()]

    started(RunConfig(epochs=1, storage=str(tmp_path)), "old").write_json(
        "summary.json", {"state": "finished", "started": SUMMARY["started"], "metrics": {"accuracy": 0.25}}
    )
    assert [row[:3] for row in listed()] == [["run", "state", "accuracy"], ["old", "finished", "0.2500"]]
    started(RunConfig(epochs=1, storage=str(tmp_path)), "mine").write_json("summary.json", SUMMARY)
    header, *rows = listed()
    assert header[2:6] == ["validation", "accuracy", "test", "accuracy"]
    assert {row[0]: row[2:4] for row in rows} == {"old": ["0.2500", "0.0"], "mine": ["0.7500", "0.5000"]}
    mine, old = (raytorch.find_run(name, tmp_path) for name in ("mine", "old"))
    assert (mine.metrics, mine.test_metrics) == ({"accuracy": 0.75}, {"accuracy": 0.5})
    assert old.metrics == old.test_metrics == {"accuracy": 0.25}
    of_loop = SUMMARY | {"name": "loop", "split": "test"}
    started(RunConfig(epochs=1, storage=str(tmp_path)), "loop").write_json("summary.json", of_loop)
    looped = raytorch.find_run("loop", tmp_path)
    assert (looped.metrics, looped.test_metrics) == ({"accuracy": 0.75}, {"accuracy": 0.5})


@pytest.mark.parametrize("validation", [Validation(share=0.1), None])  # none: a loop, which tests as it likes
def test_a_test_does_not_outlive_the_model_that_it_was_of(tmp_path: Path, validation: Validation | None) -> None:
    config = RunConfig(epochs=1, storage=str(tmp_path), validation=validation)
    plan, split = plan_run(config, "mine"), config.judged_split
    plan.folder.make()
    plan.folder.write_json("summary.json", SUMMARY | {"split": split})
    record = RunRecord(plan)
    with record.writing():
        status = RunStatus(attempts=1, begun_at=1.0)
        record.note(status)
        record.write()
        assert read_summary(plan.folder)["test_metrics"] == {"accuracy": 0.5}
        status.evaluations.append(Evaluation(9, 1.0, {"accuracy": 0.8}, split))
        record.fail(RuntimeError("lost"), status)
    summary = read_summary(plan.folder)
    assert (summary["split"], summary["metrics"], summary["test_metrics"]) == (split, {"accuracy": 0.8}, {})


def test_a_sweep_compares_by_it_and_tells_the_test_of_each(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), "swept")
    run = RunConfig(epochs=1, validation=Validation(share=0.1))
    trials = [Trial(number, {"seed": number}, run) for number in (0, 1)]
    for trial, (judged, tested) in zip(trials, ((0.75, 0.5), (0.5, 0.75)), strict=True):
        place = RunFolder(str(folder), trial.name)
        place.make()
        place.write_text("config.yaml", "epochs: 1\n")
        place.write_json("summary.json", SUMMARY | {"test_metrics": {"accuracy": tested}})
        line = {"step": 1, "epoch": 1.0}
        told = [
            line | {"split": "validation", "accuracy": judged, "loss": 1.0},
            line | {"split": "test", "accuracy": tested, "loss": 1.0},
        ]
        place.write_text("metrics.jsonl", "".join(json.dumps(each) + "\n" for each in told))
    results = [read_result(folder, trial, stopped_early=False) for trial in trials]
    best = find_best(results, "accuracy")
    assert best is results[0]
    header, row, _ = results_csv(results).splitlines()
    assert header == "trial,state,seed,epoch,validation_accuracy,validation_loss,test_accuracy,test_loss,seconds,error"
    assert row == "trial-000,finished,0,1.0,0.75,1.0,0.5,,,"
    console = Console(file=io.StringIO(), width=150, color_system=None)
    rows = [result.row() for result in results]
    summary = {"best": rows[0] | {"config": "best.yaml"}, "path": "swept", "trials": rows, "seconds": 1.0}
    print_sweep(console, trials, summary | {"metric": "accuracy", "state": "finished"})
    assert "trial-000  validation accuracy 0.7500  test accuracy 0.5000\n" in console.file.getvalue()  # type: ignore[attr-defined]
