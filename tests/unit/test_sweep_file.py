"""Reading a sweep's file: the trials that it stands for, and the message for each mistake."""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import create_model

from raytorch.cli.main import main
from raytorch.config import RunConfig, SweepConfig, own_code, project
from raytorch.config.file import dump_config
from raytorch.config.signature import signature_of
from raytorch.errors import ConfigError, UserError
from raytorch.sweeps.file import Sweep, is_sweep, load_sweep
from raytorch.system.python_files import read_source

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))
RANDOM = {
    "optimizer.lr": {"log_uniform": [1e-4, 1e-1]},
    "optimizer.weight_decay": {"uniform": [0, 0.5]},
    "batch_size": {"randint": [16, 18]},
    "model": {"choice": ["mlp", {"name": "convnet", "channels": [8, 16]}]},
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(text: str, *overrides: str) -> Sweep:
    Path("sweep.yaml").write_text(text, encoding="utf-8")
    return load_sweep("sweep.yaml", overrides)


def sweep(parameters: dict[str, Any], **keys: Any) -> Sweep:
    return read(yaml.safe_dump({"run": {"epochs": 2}, "parameters": parameters, **keys}, sort_keys=False))


def problem(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(text, *overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_sweeps(path: Path) -> None:
    assert is_sweep(path)
    assert len(load_sweep(path).trials) >= 8


def test_a_run_is_no_sweep() -> None:
    assert not any(is_sweep(path) for path in (ROOT / "configs").glob("*.yaml"))
    assert not is_sweep("nowhere.yaml")


@pytest.mark.parametrize(("options", "place"), [([], "there"), (["--storage", "here, 1"], "here, 1")])
def test_a_sweep_is_put_where_the_command_says(
    options: list[str], place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("sweep.yaml").write_text(
        "{run: {epochs: 1}, parameters: {seed: {grid: [1, 2]}}, storage: there}", encoding="utf-8"
    )
    planned: list[Any] = []

    def end(plan: Any, **_: Any) -> None:
        planned.append(plan)
        raise UserError("planned")

    monkeypatch.setattr("raytorch.sweeps.sweep.run_sweep", end)
    monkeypatch.setattr(sys, "argv", ["raytorch", "sweep", "sweep.yaml", "--name", "mine", *options])
    with pytest.raises(SystemExit):
        main()
    assert planned[0].folder.path == str(tmp_path / place / "mine")


# -- trials ------------------------------------------------------------------------------------------------------------


def test_grids_are_crossed_and_repeated() -> None:
    trials = sweep({"seed": {"grid": [1, 2]}, "optimizer.lr": {"grid": [0.1, 0.2, 0.3]}}, trials=2).trials
    points = [(trial.config.seed, trial.config.optimizer.lr) for trial in trials]
    assert points == 2 * [(seed, lr) for seed in (1, 2) for lr in (0.1, 0.2, 0.3)]
    assert [trial.name for trial in trials[:2]] == ["trial-000", "trial-001"]
    assert trials[0].parameters == {"seed": 1, "optimizer.lr": 0.1}


def test_the_points_of_a_grid_share_what_is_drawn_so_that_they_can_be_compared() -> None:
    trials = sweep({"seed": {"grid": [1, 2]}, "optimizer.lr": {"uniform": [0.1, 0.9]}}, trials=3).trials
    rates = [trial.config.optimizer.lr for trial in trials]
    assert rates[::2] == rates[1::2]
    assert len(set(rates)) == 3
    assert [list(trial.parameters) for trial in trials] == 6 * [["seed", "optimizer.lr"]]


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"optimizer.lr": [0.5], "optimizer": ["sgd", "adam"]}, [("sgd", 0.5), ("adam", 0.5)]),
        ({"optimizer.lr": [0.5], "optimizer": [{"name": "sgd", "momentum": 0.9}]}, [("sgd", 0.5)]),
        ({"optimizer.lr": [0.5], "optimizer.name": ["sgd"]}, [("sgd", 0.5)]),
    ],
)
def test_parameters_may_stand_in_any_order(parameters: dict[str, Any], expected: list[tuple[str, float]]) -> None:
    for order in (list, reversed):
        varied = {key: {"grid": parameters[key]} for key in order(list(parameters))}
        trials = sweep(varied).trials
        assert [(trial.config.optimizer.name, trial.config.optimizer.lr) for trial in trials] == expected


@pytest.mark.parametrize(
    ("parameters", "problem_there"),
    [
        ("optimizer: {grid: [sgd, adam]}, optimizer.name: {grid: [adamw]}", "optimizer.name: parameters.optimizer"),
        (
            "optimizer: {grid: [sgd, {name: sgd, lr: 1}]}, optimizer.lr: {grid: [2]}",
            "optimizer.lr: parameters.optimizer",
        ),
        (
            "scaling.workers.max: {grid: [1]}, scaling.workers: {choice: [{min: 1, max: 2}]}",
            "scaling.workers.max: parameters.scaling.workers",
        ),
    ],
)
def test_no_parameter_overrules_another(parameters: str, problem_there: str) -> None:
    told = problem(f"run: {{epochs: 1}}\nparameters: {{{parameters}}}")
    assert told == f"sweep.yaml:2: {problem_there} sets it too; leave it out of one of them"


def test_values_that_python_takes_for_equal_are_each_its_own() -> None:
    told = problem("run: {epochs: 1}\nparameters:\n  clip_norm: {grid: [1, true]}")
    assert told == "sweep.yaml:3: clip_norm: must be a number above 0 or null, not the boolean true"
    trials = sweep({"compile": {"grid": [False, True]}, "seed": {"grid": [0, 1]}}).trials
    assert [(trial.config.compile, trial.config.seed) for trial in trials] == [
        (False, 0),
        (False, 1),
        (True, 0),
        (True, 1),
    ]


def test_drawn_values_are_in_their_ranges() -> None:
    trials = sweep(RANDOM, trials=200).trials
    rates = [trial.config.optimizer.lr for trial in trials]
    assert all(1e-4 <= rate <= 1e-1 for rate in rates)
    assert 40 < sum(rate < 1e-3 for rate in rates) < 95  # a third, as each of the three orders of magnitude
    decays = [trial.config.optimizer.weight_decay for trial in trials]
    assert all(0 <= decay <= 0.5 for decay in decays)
    assert 70 < sum(decay < 0.25 for decay in decays) < 130
    assert {trial.config.batch_size for trial in trials} == {16, 17, 18}
    assert {trial.config.model.name for trial in trials} == {"mlp", "convnet"}


def test_the_seed_decides_what_is_drawn() -> None:
    first, same, other = (sweep(RANDOM, trials=5, seed=seed).trials for seed in (3, 3, 4))
    assert first == same
    assert first != other


def test_what_is_not_varied_is_the_runs() -> None:
    (trial,) = sweep({"optimizer.lr": {"grid": [0.5]}}, run={"epochs": 3, "optimizer": "sgd", "seed": 9}).trials
    assert trial.config == RunConfig.model_validate({"epochs": 3, "optimizer": {"name": "sgd", "lr": 0.5}, "seed": 9})


def test_a_run_in_a_file_of_its_own() -> None:
    Path("runs").mkdir()
    Path("runs/mine.yaml").write_text("epochs: 4\noptimizer: sgd\n", encoding="utf-8")
    (trial,) = read("run: runs/mine.yaml\nparameters: {optimizer.lr: {grid: [0.5]}}").trials
    assert (trial.config.epochs, trial.config.optimizer.name, trial.config.optimizer.lr) == (4, "sgd", 0.5)
    assert read("run: runs/mine.yaml\nparameters: {seed: {grid: [1]}}", "run.epochs=5").trials[0].config.epochs == 5


def test_overrides_reach_the_sweep_and_its_run() -> None:
    text = "run: {epochs: 4}\nparameters: {seed: {randint: [1, 9]}}"
    changed = read(text, "trials=3", "asha.reduction=2", "run.optimizer.lr=0.5")
    assert len(changed.trials) == 3
    assert changed.config.asha
    assert (changed.config.asha.reduction, changed.trials[0].config.optimizer.lr) == (2, 0.5)


def test_a_sweep_that_was_written_down_is_the_same() -> None:
    asked = sweep({**RANDOM, "seed": {"grid": [1, 2]}}, trials=4, asha={"reduction": 2}, storage="/data/runs")
    text = dump_config(asked.config)
    assert read(text) == asked
    assert "null" not in text[text.index("parameters:") : text.index("trials:")]  # what was not given is not there


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        ("optimizer.learning_rate: {grid: [1]}", "optimizer.learning_rate: unknown key; allowed: name, lr, betas, "),
        ("optimiser.lr: {grid: [1]}", "optimiser: unknown key; allowed: name, seed, "),
        ("optimizer.lr: {grid: [0.1, x]}", "optimizer.lr: must be a number above 0, not 'x'"),
        ("optimizer.lr: {choice: [0.1, 0]}", "optimizer.lr: must be a number above 0, not 0"),
        ("optimizer.lr: {uniform: [-1, 1]}", "optimizer.lr: must be a number above 0, not -1.0"),
        ("batch_size: {uniform: [16, 64]}", "batch_size: must be a whole number of at least 1, not 16.0"),
        ("batch_size: {randint: [0, 64]}", "batch_size: must be a whole number of at least 1, not 0"),
        ("model: {grid: [mlp, convnett]}", "model: must be one of mlp, convnet, "),
        ("model.name: {grid: [mlp, conv3d]}", "model.name: model conv3d reads clips, data digits has images"),
        (
            "optimizer.lr: {grids: [1]}",
            "parameters.'optimizer.lr'.grids: unknown key; allowed: grid, choice, uniform, ",
        ),
        (
            "optimizer.lr: {grid: []}",
            "parameters.'optimizer.lr'.grid: must be a list of 1 or more or null, not a list ",
        ),
        ("optimizer.lr: 3", "parameters.'optimizer.lr': must be a mapping with keys among grid, choice, "),
        ("optimizer.lr: {}", "parameters.'optimizer.lr': give one of grid, choice, uniform, log_uniform, randint"),
        ("seed: {grid: [1], choice: [2]}", "parameters.seed.choice: give one of grid, choice, "),
        ("optimizer.lr: {uniform: [1]}", "parameters.'optimizer.lr'.uniform: must be a list of 2, each a number or "),
        (
            "optimizer.lr: {uniform: [2, 1]}",
            "parameters.'optimizer.lr'.uniform: the first number (2) must be below the second (1)",
        ),
        (
            "optimizer.lr: {log_uniform: [0, 1]}",
            "parameters.'optimizer.lr'.log_uniform: both numbers must be above 0, not 0",
        ),
    ],
)
def test_a_parameter_that_the_run_cannot_have(parameter: str, message: str) -> None:
    told = problem(f"run: {{epochs: 1}}\nparameters:\n  {parameter}\n")
    assert told.startswith(f"sweep.yaml:3: {message}")
    assert "\n" not in told


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "sweep.yaml: the file is empty; give a run and its parameters"),
        ("[1]", "sweep.yaml:1: must be {run: ..., parameters: ...}, not a list of 1"),
        ("run: {epochs: 1}", "sweep.yaml:1: parameters: missing; must be a mapping of 1 or more keys"),
        (
            "run: {epochs: 1}\nparameters: {}",
            "sweep.yaml:2: parameters: must be a mapping of 1 or more keys, not an empty mapping",
        ),
        (
            "run: {epochs: 0}\nparameters: {seed: {grid: [1]}}",
            "sweep.yaml:1: run.epochs: must be a whole number of at least 1 or null, not 0",
        ),
        ("run: none.yaml\nparameters: {seed: {grid: [1]}}", "sweep.yaml:1: run: none.yaml: no such file"),
        (
            "run: {epochs: 1}\nparameters: {storage: {grid: [a]}}",
            "sweep.yaml:2: parameters: storage cannot vary: it is where a trial's folder is",
        ),
        (
            "run: {epochs: 1}\nparameters: {seed: {grid: [1]}}\nasha: {reduction: 1}",
            "sweep.yaml:3: asha.reduction: must be a number above 1, not 1",
        ),
        (
            "run: {epochs: 1}\nparameters: {seed: {grid: [1]}}\nmetric: f1",
            "sweep.yaml:3: metric: no metric f1 in this run; one of accuracy, loss",
        ),
        (
            "run: {epochs: 1}\nparameters: {metrics: {grid: [[accuracy], [own.py:f1]]}}\nmetric: accuracy",
            "sweep.yaml:3: metric: a trial lacks it: no metric accuracy in this run; one of f1, loss",
        ),
        (
            "run: {epochs: 1}\nparameters: {metrics: {grid: [[accuracy], [own.py:f2]]}}",
            "sweep.yaml:2: metrics[0].name: own.py has no f2 at its top level; define it there",
        ),
        (
            "run: {epochs: 1}\nparameters: {seed: {grid: [1, 2]}}\ntrials: 1000000000",
            "sweep.yaml:3: trials: 2,000,000,000 trials are more than the 10,000 that a sweep may have; draw fewer, or "
            "list less in the grids",
        ),
    ],
)
def test_a_sweep_that_cannot_be(text: str, message: str) -> None:
    Path("own.py").write_text("def f1(model, batch): ...\n", encoding="utf-8")
    assert problem(text) == message


def test_own_code_is_read_as_often_however_many_trials_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand trials are planned in a moment: what they share is read, parsed and made a schema of once."""
    own = "class Net:\n    def __init__(self, *, width: int = 8): ...\ndef other(*, width: int = 2): ...\n"
    Path("own.py").write_text(f"{own}def f1(model, batch): ...\n", encoding="utf-8")
    parameters = {"model.width": {"grid": [1, 2]}, "model.name": {"choice": ["own.py:Net", "own.py:other"]}}
    run = {"epochs": 1, "model": "own.py:Net", "metrics": ["own.py:f1"], "loss": "own.py:f1"}
    counts = []
    for trials in (10, 100):
        done = Counter[str]()

        def counted(name: str, call: Callable[..., Any], done: Counter[str] = done) -> Callable[..., Any]:
            return lambda *arguments, **options: (done.update([name]), call(*arguments, **options))[1]

        with monkeypatch.context() as patch:
            patch.setattr(project, "read_source", counted("read", read_source))
            patch.setattr(own_code, "signature_of", counted("signature", signature_of))
            patch.setattr(own_code, "create_model", counted("schema", create_model))
            drawn = sweep(parameters, run=run, trials=trials).trials
        assert {trial.config.model.name for trial in drawn} == {"own.py:Net", "own.py:other"}
        assert [getattr(trial.config.model, "arguments", None) for trial in drawn[:2]] == [{"width": 1}, {"width": 2}]
        counts.append(done)
    assert counts[0] == counts[1]
    assert counts[0]["schema"] == 2


def test_trials_that_disagree_on_what_is_better_are_refused() -> None:
    """They could not be compared."""
    grid = "[[accuracy], [{name: accuracy, better: lower}]]"
    told = problem(f"run: {{epochs: 2}}\nparameters:\n  metrics: {{grid: {grid}}}\n")
    assert told == (
        "sweep.yaml:3: metrics: of accuracy the better of two values is another in a trial than in the run; leave one "
        "of them out"
    )


def test_a_mistake_in_the_runs_own_file_is_told_there() -> None:
    Path("mine.yaml").write_text("seed: 1\nepochs: 0\n", encoding="utf-8")
    told = problem("run: mine.yaml\nparameters: {seed: {grid: [1]}}")
    assert told == "mine.yaml:2: run.epochs: must be a whole number of at least 1 or null, not 0"


def test_a_mistake_in_an_override_is_told_as_such() -> None:
    told = problem("run: {epochs: 1}\nparameters: {seed: {grid: [1]}}", "run.epochs=0")
    assert told == "override run.epochs=0: run.epochs: must be a whole number of at least 1 or null, not 0"


def test_values_that_do_not_go_together_are_refused() -> None:
    varied = "batch_size: {grid: [8, 2]}\n  accumulate: {grid: [1, 2]}"
    told = problem(f"run: {{epochs: 1, scaling: {{workers: 4}}}}\nparameters:\n  {varied}")
    assert told.startswith("sweep.yaml:3: batch_size: batch_size (2) must be at least workers x accumulate (4 x 2 = 8)")


def test_a_sweep_of_python_code() -> None:
    config = SweepConfig.model_validate({"run": {"epochs": 1}, "parameters": {"seed": {"grid": [1, 2]}}})
    assert config.draw() == [{"seed": 1}, {"seed": 2}]
