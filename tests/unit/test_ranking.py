"""The metrics of a run: how they are called, and which of two evaluations is better by one of them."""

from typing import Any

import pytest

from raytorch.config import ConflictError, Metric, OwnMetric, Ranking, RunConfig, SweepConfig
from raytorch.config.file import dump_config, from_data

OWN = ["tagger.py:f1", {"name": "nets/tagger.py:errors", "better": "lower"}]


def run(**values: Any) -> RunConfig:
    return RunConfig.model_validate({"epochs": 1, **values})


@pytest.mark.parametrize(
    ("values", "names", "ranking"),
    [
        ({}, ("accuracy",), Ranking("accuracy", higher_is_better=True)),
        ({"metrics": ["accuracy"]}, ("accuracy",), Ranking("accuracy", higher_is_better=True)),
        ({"checkpoint": {"best_by": "loss"}}, ("accuracy",), Ranking("loss", higher_is_better=False)),
        ({"metrics": OWN}, ("f1", "errors"), Ranking("f1", higher_is_better=True)),
        (
            {"metrics": OWN, "checkpoint": {"best_by": "errors"}},
            ("f1", "errors"),
            Ranking("errors", higher_is_better=False),
        ),
        (
            {"metrics": OWN, "checkpoint": {"best_by": "tagger.py:f1"}},
            ("f1", "errors"),
            Ranking("f1", higher_is_better=True),
        ),
    ],
)
def test_the_first_metric_ranks_unless_another_is_named(
    values: dict[str, Any], names: tuple[str, ...], ranking: Ranking
) -> None:
    assert (run(**values).metric_names, run(**values).ranking) == (names, ranking)


def test_without_a_metric_the_loss_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    config = run()
    monkeypatch.setattr(type(config.model), "metrics", ())
    assert (config.metric_names, config.ranking) == ((), Ranking("loss", higher_is_better=False))
    with pytest.raises(ConflictError, match=r"^no metric accuracy in this run; one of loss$"):
        config.ranking_by("accuracy")


def test_a_sweep_compares_trials_as_its_run_ranks() -> None:
    def sweep(**values: Any) -> SweepConfig:
        parameters = {"seed": {"grid": [1, 2]}}
        return SweepConfig.model_validate({"run": {"epochs": 1, "metrics": OWN}, "parameters": parameters, **values})

    assert sweep().ranking == Ranking("f1", higher_is_better=True)
    assert sweep(metric="errors").ranking == Ranking("errors", higher_is_better=False)


def test_the_better_of_two_evaluations_has_the_higher_score() -> None:
    higher, lower = Ranking("f1", higher_is_better=True), Ranking("f1", higher_is_better=False)
    low, high = {"f1": 0.25, "loss": 9.0}, {"f1": 0.75}
    assert higher.score(high) > higher.score(low) > higher.score({}) == higher.score({"f1": float("nan")})
    assert lower.score(low) > lower.score(high) > lower.score({}) == lower.score({"f1": float("nan")})


def test_a_name_alone_stands_for_a_metric_of_which_more_is_better() -> None:
    assert run(metrics=OWN).metrics == [
        OwnMetric(name="tagger.py:f1", better="higher"),
        OwnMetric(name="nets/tagger.py:errors", better="lower"),
    ]
    assert run(metrics=["accuracy"]).metrics == [Metric(name="accuracy", better="higher")]
    assert RunConfig.model_validate(run(metrics=OWN).model_dump()) == run(metrics=OWN)


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_what_older_versions_have_recorded_means_the_same(metric: str) -> None:
    recorded = {"epochs": 1, "checkpoint": {"best_by": metric}, "stop": {"metric": metric, "patience": 2}}
    config = from_data(recorded)
    assert config.ranking == config.ranking_by(metric) == Ranking(metric, higher_is_better=metric == "accuracy")
    assert "metrics: []\n" in dump_config(config)
