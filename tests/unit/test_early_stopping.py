"""Early stopping: which evaluations count as better, and what a checkpoint keeps of them."""

from typing import Any

import pytest

from raytorch.config import EarlyStopping, RunConfig
from raytorch.errors import CheckpointError, ConfigError
from raytorch.training.api import load
from raytorch.training.stopping import Patience


def run(**stop: Any) -> RunConfig:
    """A run that ends early."""
    return RunConfig.model_validate({"epochs": 9, "stop": stop})


def over(config: RunConfig, values: list[float]) -> list[bool]:
    """After each evaluation, whether the run is to end; half of them after a checkpoint."""
    patience, ends = Patience(config), []
    metric = (config.stop and config.stop.metric) or "accuracy"
    for number, value in enumerate(values):
        if number == len(values) // 2:
            before, patience = patience, Patience(config)
            patience.load_state_dict(before.state_dict())
        patience.look({metric: value})
        ends.append(patience.is_over)
    return ends


@pytest.mark.parametrize(
    ("config", "values", "expected"),
    [
        (run(patience=2), [0.5, 0.6, 0.6, 0.7, 0.7, 0.6], [0, 0, 0, 0, 0, 1]),
        (run(patience=1, min_change=0.05), [0.5, 0.6, 0.64], [0, 0, 1]),
        (run(patience=3, metric="loss"), [1.0, 0.9, 0.95, 0.92, 0.9], [0, 0, 0, 0, 1]),
        (run(patience=2), [float("nan"), 0.1, float("nan"), float("nan")], [0, 0, 0, 1]),
    ],
)
def test_evaluations_without_a_better_one_are_counted(
    config: RunConfig, values: list[float], expected: list[bool]
) -> None:
    assert over(config, values) == expected


def test_without_a_configuration_nothing_ends() -> None:
    patience = Patience(RunConfig(epochs=9))
    for _ in range(5):
        patience.look({"accuracy": 0.5})
    assert (patience.is_over, patience.reason()) == (False, None)


def test_the_reason_is_told() -> None:
    patience = Patience(run(patience=1))
    for _ in range(2):
        patience.look({"accuracy": 0.5})
    assert patience.reason() == "no better accuracy in 1 evaluation"


@pytest.mark.parametrize("state", [{"waited": "2"}, {"waited": -1}, {"waited": 1, "best": "x"}, {"waited": True}])
def test_a_damaged_state_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="early stopping"):
        Patience(run(patience=1)).load_state_dict({"metric": "accuracy", **state})


def test_another_metric_begins_anew() -> None:
    before = Patience(run(patience=1))
    before.look({"accuracy": 0.5})
    after = Patience(run(patience=1, metric="loss"))
    after.load_state_dict(before.state_dict())
    after.look({"loss": 7.0})
    assert not after.is_over


def test_a_metric_of_which_the_other_is_better_begins_anew() -> None:
    before = Patience(run(patience=1))
    before.look({"accuracy": 0.5})
    metrics = [{"name": "accuracy", "better": "lower"}]
    after = Patience(RunConfig.model_validate({"epochs": 9, "stop": {"patience": 1}, "metrics": metrics}))
    after.load_state_dict(before.state_dict())
    after.look({"accuracy": 0.7})
    assert not after.is_over
    after.look({"accuracy": 0.8})
    assert after.is_over


@pytest.mark.parametrize(("metric", "best"), [("accuracy", 0.5), ("loss", -0.5)])
def test_evaluations_that_an_older_version_has_counted_count_on(metric: str, best: float) -> None:
    for waited, is_over in ((1, True), (0, False)):
        patience = Patience(run(patience=2, metric=metric))
        patience.load_state_dict({"metric": metric, "best": best, "waited": waited})
        patience.look({"accuracy": 0.5, "loss": 0.5})
        assert patience.is_over is is_over


def test_a_run_names_it() -> None:
    config = load({"epochs": 3, "stop": {"patience": 2}})
    assert config.stop == RunConfig(epochs=3, stop=EarlyStopping(patience=2)).stop
    with pytest.raises(ConfigError, match=r"stop.patience: missing; must be a whole number of at least 1"):
        load({"epochs": 3, "stop": {}})
