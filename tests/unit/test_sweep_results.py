"""What a sweep leaves and shows, from the folders of its trials."""

import csv
import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from raytorch.config import Parameter, RunConfig, SweepConfig
from raytorch.config.file import dump_config, load_config
from raytorch.errors import ConfigError, RunExistsError, RunNotFoundError
from raytorch.runs.plan import placed
from raytorch.runs.storage import RunFolder
from raytorch.sweeps.file import Sweep, Trial
from raytorch.sweeps.live_table import SweepDisplay, print_sweep
from raytorch.sweeps.picture import picture
from raytorch.sweeps.result_files import write_results
from raytorch.sweeps.results import TrialResult, find_best, read_result, results_csv
from raytorch.sweeps.sweep import SweepPlan, SweepStatus, plan_resumed_sweep, plan_sweep, run_sweep

CONFIG = SweepConfig.model_validate(
    {
        "name": "mine",
        "run": {"epochs": 3, "seed": 5},
        "parameters": {"optimizer.lr": {"log_uniform": [1e-3, 1e-1]}, "model": {"grid": ["mlp", "convnet", "rnn"]}},
    }
)
SWEEP = Sweep(
    CONFIG,
    tuple(
        Trial(n, {"optimizer.lr": 0.01 * n + 0.01, "model": name}, CONFIG.run)
        for n, name in enumerate(("mlp", "convnet", "rnn"))
    ),
)


def write_trial(folder: RunFolder, number: int, state: str, accuracies: list[float]) -> None:
    place = RunFolder(str(folder), f"trial-{number:03}")
    place.make()
    place.write_text("config.yaml", "epochs: 3\n")
    driver = {"host": "elsewhere", "pid": 1}
    summary = {"state": state, "started": "", "driver": driver, "seconds": {"total": 1.5}}
    place.write_json("summary.json", summary)
    lines = [{"split": "train", "step": 1, "epoch": 0.1, "loss": 9.0}]
    lines += [
        {"split": "test", "step": 10 * n, "epoch": n, "accuracy": accuracy, "loss": 1 - accuracy}
        for n, accuracy in enumerate(accuracies, start=1)
    ]
    place.write_text("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A sweep's folder: the first trial has finished, the second was stopped, the third has not begun."""
    folder = RunFolder(str(tmp_path / "runs"), "swept")
    write_trial(folder, 0, "finished", [0.5, 0.7, 0.9])
    write_trial(folder, 1, "stopped", [0.95])
    return folder


def results(folder: RunFolder, *stopped_early: int) -> list[TrialResult]:
    return [read_result(folder, trial, trial.number in stopped_early) for trial in SWEEP.trials]


def test_the_state_of_a_trial(folder: RunFolder) -> None:
    assert [result.state for result in results(folder)] == ["finished", "stopped", "waiting"]
    early = results(folder, 0, 1)
    assert [result.state for result in early] == ["finished", "stopped early", "waiting"]  # the first was quicker
    assert [result.is_over for result in early] == [True, True, False]
    assert not results(folder)[1].is_over  # by hand: to be gone on with


def test_the_table(folder: RunFolder) -> None:
    rows = list(csv.DictReader(io.StringIO(results_csv(results(folder, 1)))))
    assert rows[0] == {
        "trial": "trial-000",
        "state": "finished",
        "optimizer.lr": "0.01",
        "model": "mlp",
        "epoch": "3",
        "test_accuracy": "0.9",
        "test_loss": str(1 - 0.9),
        "seconds": "1.5",
        "error": "",
    }
    assert [row["state"] for row in rows] == ["finished", "stopped early", "waiting"]
    assert (rows[2]["epoch"], rows[2]["test_accuracy"], rows[2]["seconds"]) == ("", "", "")


def test_the_best_is_the_best_that_finished(folder: RunFolder) -> None:
    assert find_best(results(folder), "accuracy") is not None
    write_trial(folder, 2, "finished", [0.99, 0.85])
    for metric in ("accuracy", "loss"):
        best = find_best(results(folder), metric)
        assert best
        assert best.trial.number == 0  # not the one that was better for a while, nor the one that was stopped
    write_trial(folder, 2, "finished", [0.91])
    assert [find_best(results(folder), metric).trial.number for metric in ("accuracy", "loss")] == [2, 2]  # type: ignore[union-attr]
    write_trial(folder, 2, "finished", [0.9])
    place = RunFolder(str(folder), "trial-002")
    place.write_text("metrics.jsonl", place.read_bytes("metrics.jsonl").decode().replace(str(1 - 0.9), "0.01"))
    assert find_best(results(folder), "accuracy").trial.number == 2  # type: ignore[union-attr]  # of equals
    assert find_best(results(folder)[1:2], "accuracy") is None


def test_the_best_is_so_by_a_metric_of_any_name_and_of_its_own_order(folder: RunFolder) -> None:
    metrics = ["f1", {"name": "mine.py:errors", "better": "lower"}]
    run = RunConfig.model_validate({"epochs": 3, "metrics": ["mine.py:f1", metrics[1]]})
    config = CONFIG.model_copy(update={"run": run})
    for number, (f1, errors) in enumerate([(0.5, 3.0), (0.75, 4.0), (0.75, 2.0)]):
        write_trial(folder, number, "finished", [])
        line = {"split": "test", "step": 1, "epoch": 1.0, "f1": f1, "errors": errors, "loss": 1.0}
        RunFolder(str(folder), f"trial-{number:03}").write_text("metrics.jsonl", json.dumps(line) + "\n")
    found = [read_result(folder, Trial(n, trial.parameters, run), False) for n, trial in enumerate(SWEEP.trials)]
    assert config.ranking.label == "f1"
    for metric, number in (("f1", 2), ("errors", 2), ("loss", 2)):
        best = find_best(found, metric)
        assert best
        assert best.trial.number == number, metric
    write_results(folder, config, found)
    best_file = (Path(folder.path) / "best.yaml").read_text(encoding="utf-8")
    assert best_file.startswith("# trial-002 of the sweep swept: test f1 0.7500\n")
    assert b"test_f1,test_errors,test_loss" in (Path(folder.path) / "results.csv").read_bytes()


def test_the_files(folder: RunFolder) -> None:
    write_results(folder, CONFIG, results(folder))
    path = Path(folder.path)
    assert (path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert (path / "results.csv").read_text(encoding="utf-8") == results_csv(results(folder))
    best = path / "best.yaml"
    assert best.read_text(encoding="utf-8").startswith("# trial-000 of the sweep swept: test accuracy 0.9000\n")
    assert load_config(best) == placed(CONFIG.run, "mine-best", CONFIG.storage)


def test_the_loss_can_be_a_parameter(folder: RunFolder) -> None:
    trial = Trial(0, {"loss": "mse"}, CONFIG.run)
    text = results_csv([read_result(folder, trial, False)])
    assert text.startswith(
        "trial,state,loss,epoch,test_accuracy,test_loss,seconds,error\ntrial-000,finished,mse,3,0.9,"
    )


def test_nothing_finished_leaves_no_best(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "runs"), "swept")
    folder.make()
    write_results(folder, CONFIG, results(folder))
    assert not folder.exists("best.yaml")
    assert folder.exists("sweep.png")


def test_plans(tmp_path: Path, folder: RunFolder) -> None:
    sweep = Sweep(CONFIG.model_copy(update={"storage": str(tmp_path / "runs")}), SWEEP.trials)
    assert plan_sweep(sweep).folder.name.startswith("mine-20")
    with pytest.raises(ConfigError, match=r"^name '': must be "):
        plan_sweep(sweep, "")
    with pytest.raises(RunExistsError, match="take another name, or resume it"):
        plan_sweep(sweep, "swept")
    with pytest.raises(RunNotFoundError, match=r"no sweep swept in .*: it has no sweep.yaml"):
        plan_resumed_sweep(str(folder))


# -- what a person sees ------------------------------------------------------------------------------------------------


def shown(*statuses: SweepStatus, terminal: bool = False) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120, color_system=None)
    with SweepDisplay(console, SWEEP.trials) as display:
        for status in statuses:
            display(status)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def rows(*states: str, **numbers: float) -> list[dict[str, Any]]:
    return [{"state": state, **(numbers if state not in ("waiting", "starting") else {})} for state in states]


def test_without_a_terminal_there_is_a_line_for_what_begins_and_ends() -> None:
    text = shown(
        SweepStatus(rows("waiting", "waiting", "waiting")),
        SweepStatus(rows("starting", "waiting", "waiting")),
        SweepStatus(rows("training", "waiting", "waiting", epoch=1, metrics={"accuracy": 0.5, "loss": 0.25})),
        SweepStatus(rows("finished", "starting", "waiting", epoch=2, metrics={"accuracy": 0.75, "loss": 0.125})),
        SweepStatus(
            rows("finished", "stopped early", "waiting", epoch=2, metrics={"accuracy": 0.75, "loss": 0.125}),
            stopping=True,
        ),
    )
    assert text.splitlines() == [
        "trial-000  starting       optimizer.lr=0.01  model=mlp",
        "trial-000  finished       epoch 2  accuracy 0.7500  loss 0.1250  optimizer.lr=0.01  model=mlp",
        "trial-001  starting       optimizer.lr=0.02  model=convnet",
        "stopping the trials after a last checkpoint; press Ctrl-C again to end at once",
        "trial-001  stopped early  epoch 2  accuracy 0.7500  loss 0.1250  optimizer.lr=0.02  model=convnet",
    ]


def test_a_terminal_shows_a_table() -> None:
    text = shown(
        SweepStatus(rows("training", "starting", "waiting", epoch=1.5, metrics={"accuracy": 0.5, "loss": 0.25})),
        terminal=True,
    )
    assert "trial      state     lr    model    epoch  accuracy  loss" in text
    assert "trial-000  training  0.01  mlp      1.5    0.5000    0.2500" in text
    assert "trial-002  waiting   0.03  rnn" in text


@pytest.mark.parametrize("state", ["finished", "stopped"])
def test_the_summary(folder: RunFolder, state: str) -> None:
    write_trial(folder, 2, "failed", [])
    place = RunFolder(str(folder), "trial-002")
    summary = json.loads(place.read_bytes("summary.json"))
    place.write_json("summary.json", summary | {"error": {"message": "the loss became nan"}})
    there = results(folder, 1)
    summary = {
        "state": state,
        "path": str(folder),
        "seconds": 12.34,
        "metric": "accuracy",
        "trials": [result.row() for result in there],
        "best": {**there[0].row(), "config": f"{folder}/best.yaml"},
    }
    console = Console(file=io.StringIO(), width=80, color_system=None)
    print_sweep(console, SWEEP.trials, summary)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[4:6] == [
        "trial-002 failed: the loss became nan",
        "3 trials: 1 finished, 1 stopped early, 1 failed  ·  12.3 s",
    ]
    assert lines[6:11] == [
        "best      trial-000  test accuracy 0.9000",
        f"sweep     {folder}",
        f"results   {folder}/results.csv",
        f"picture   {folder}/sweep.png",
        f"train it  raytorch train {folder}/best.yaml",
    ]
    assert lines[11:] == ([f"continue  raytorch sweep --resume {folder}"] if state == "stopped" else [])


def test_a_sweep_goes_without_its_picture_where_none_can_be_drawn(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_results(folder, CONFIG, results(folder))
    assert "there is no picture of the sweep: matplotlib is not installed here: pip install" in caplog.text
    assert (folder.exists("results.csv"), folder.exists("best.yaml"), folder.exists("sweep.png")) == (True, True, False)


def test_a_sweep_that_has_finished_is_left_as_it_is(folder: RunFolder) -> None:
    for number in range(3):
        write_trial(folder, number, "finished", [0.5, 0.9])
    plan = SweepPlan(SWEEP, folder)
    record = {
        "state": "finished",
        "started": "2026-01-02T03:04:05+00:00",
        "seconds": 3.0,
        "best": {"trial": "trial-000"},
    }
    folder.write_json("sweep.json", record)
    told = run_sweep(plan, watch=lambda status: pytest.fail("it was run"))
    assert told.keys() == record.keys() | {"trials"}
    assert [row["metrics"]["accuracy"] for row in (told["best"], *told["trials"])] == [0.9] * 4  # read off the trials
    assert json.loads(folder.read_bytes("sweep.json")) == record


def test_a_resumed_sweep_that_fails_keeps_what_it_had_come_to(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> None:
        raise RuntimeError("it died")

    folder.write_text("sweep.yaml", dump_config(CONFIG))
    folder.write_json("sweep.json", {"state": "finished", "best": {"trial": "trial-000"}, "error": {"cause": "error"}})
    monkeypatch.setattr("raytorch.sweeps.sweep.ray_for", lambda *_, **__: nullcontext())
    monkeypatch.setattr("raytorch.sweeps.sweep._run_trials", lost)
    with pytest.raises(RuntimeError, match="it died"):
        run_sweep(SweepPlan(SWEEP, folder, is_new=False))
    now = json.loads(folder.read_bytes("sweep.json"))
    assert (now["state"], now["best"], now["error"]["message"]) == ("failed", {"trial": "trial-000"}, "it died")


@pytest.mark.parametrize("is_new", [True, False])
def test_a_sweep_that_another_process_has_run_meanwhile_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_new: bool
) -> None:
    folder = RunFolder(str(tmp_path), "swept")
    record = {"state": "finished", "best": {"trial": "trial-000"}}

    @contextmanager
    def meanwhile(*_: object, **__: object) -> Iterator[None]:
        for trial in load_sweep_of(folder).sweep.trials:
            write_trial(folder, trial.number, "finished", [0.5, 0.9])
        folder.write_json("sweep.json", record)
        yield

    def load_sweep_of(folder: RunFolder) -> SweepPlan:
        folder.make()
        folder.write_text("sweep.yaml", dump_config(CONFIG))
        return plan_resumed_sweep(str(folder))

    monkeypatch.setattr("raytorch.sweeps.sweep.ray_for", meanwhile)
    monkeypatch.setattr("raytorch.sweeps.sweep._run_trials", lambda *_: pytest.fail("it was run"))
    if is_new:
        with pytest.raises(RunExistsError, match="swept exists already; take another name, or resume it"):
            run_sweep(SweepPlan(SWEEP, folder))
    else:
        told = run_sweep(load_sweep_of(folder))
        assert (told["state"], told["best"]["trial"]) == ("finished", "trial-000")
    assert json.loads(folder.read_bytes("sweep.json")) == record


def test_a_picture_tells_trials_apart_and_shows_decades(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    rates = [1e-4, 1e-2, 1e-1]
    config = CONFIG.model_copy(update={"parameters": {"optimizer.lr": Parameter(grid=rates)}})
    for number, rate in enumerate(rates):
        write_trial(folder, number, "finished" if number else "stopped", [0.3 + rate, 0.5 + rate])
    trials = [Trial(number, {"optimizer.lr": rate}, CONFIG.run) for number, rate in enumerate(rates)]
    picture("mine", config, [read_result(folder, trial, False) for trial in trials])
    curves, parameter = drawn[0].axes
    assert len({line.get_color() for line in curves.lines}) == len({line.get_color() for line in parameter.lines}) == 3
    labels = [text.get_text() for text in curves.get_legend().get_texts()]
    assert labels == ["trial-000", "trial-001", "trial-002, the best"]
    assert (parameter.get_xscale(), curves.get_yscale()) == ("log", "linear")
