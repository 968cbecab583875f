"""A run that is judged by samples apart from the test split: which these are, and what is made of them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lone_runs import final
from stored_runs import Monitor, project_with_store, train
from torch import Tensor
from whole_runs import assert_bitwise_equal

from raytorch.config import RunConfig, Validation
from raytorch.config.file import from_data
from raytorch.config.resuming import refused_changes
from raytorch.datasets import load_splits
from raytorch.datasets.requests import Request, Split
from raytorch.errors import ConfigError
from raytorch.runs import curves
from raytorch.runs.catalog import read_evaluations, read_history
from raytorch.runs.metrics import PACE_KEYS
from raytorch.runs.storage import RunFolder
from raytorch.training.progress import RunProgress

CPU = torch.device("cpu")
SHARE = {"share": 0.1}


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with an object store; no Ray."""
    with project_with_store(tmp_path, monkeypatch) as folder:
        yield folder


def contents(split: Split) -> list[bytes]:
    """Each sample of a split, as bytes: no two of the digits are the same."""
    [(images, _)] = split.read([Request(torch.arange(len(split)), 0, epoch=0)])
    return [image.numpy().tobytes() for image in images]


# -- which samples -----------------------------------------------------------------------------------------------------


def test_a_share_is_drawn_by_the_seed_and_taken_from_the_training_samples() -> None:
    def parts(seed: int) -> tuple[list[bytes], list[bytes]]:
        splits = load_splits(RunConfig(epochs=1, seed=seed, validation=Validation(share=0.1)), CPU)
        assert splits.test is not None
        assert (len(splits.train), len(splits.judged), len(splits.test)) == (1350, 150, 297)
        return contents(splits.train), contents(splits.judged)

    whole = contents(load_splits(RunConfig(epochs=1), CPU).train)
    train, judged = parts(1)
    assert sorted(train + judged) == sorted(whole)
    assert not set(train) & set(judged)
    assert parts(1) == (train, judged)
    assert parts(2)[1] != judged
    assert judged != whole[-150:]


def test_without_it_a_run_is_judged_by_the_test_split() -> None:
    splits = load_splits(RunConfig(epochs=1), CPU)
    assert (len(splits.train), len(splits.judged), splits.test) == (1500, 297, None)


def test_steps_are_of_the_samples_that_are_left() -> None:
    run = RunConfig(epochs=1, batch_size=50, validation=Validation(share=0.5))
    assert run.most_steps == 15


OWN = """
import torch

class Rows:
    facts = {"input_shape": [2], "num_classes": 2}

    def __init__(self, split: str):
        self.length = {"train": 30, "valid": 7, "test": 5}[split]

    def __len__(self):
        return self.length

    def batch(self, indices):
        return torch.ones(len(indices), 2) * indices[:, None], indices % 2
"""


def test_an_own_data_set_is_called_with_the_splits_name() -> None:
    Path("rows.py").write_text(OWN, encoding="utf-8")

    def sizes(validation: dict[str, Any]) -> list[int | None]:
        config = from_data({"epochs": 1, "data": "rows.py:Rows", "validation": validation})
        return [split and len(split) for split in load_splits(config, CPU)[:3]]

    assert sizes({"split": "valid"}) == [30, 7, 5]
    assert sizes({"share": 0.2}) == [24, 6, 5]
    Path("rows.py").write_text(OWN.replace(', "test": 5', ""), encoding="utf-8")
    assert sizes({"split": "valid", "test": False}) == [30, 7, None]
    with pytest.raises(KeyError, match="test"):
        sizes({"split": "valid"})
    with pytest.raises(
        ConfigError,
        match=r"^validation.share: 0.01 of 30 training samples is 0, and the rest 30; give a share that leaves some",
    ):
        sizes({"share": 0.01, "test": False})


def test_of_an_own_data_set_whose_neighbours_go_on_from_each_other_it_is_the_end() -> None:
    Path("rows.py").write_text(OWN.replace("    facts =", "    ordered = True\n    facts ="), encoding="utf-8")
    splits = load_splits(from_data({"epochs": 1, "data": "rows.py:Rows", "validation": {"share": 0.2}}), CPU)
    rows = []
    for split in (splits.train, splits.judged):
        [(inputs, _)] = split.read([Request(torch.arange(len(split)), 0, epoch=0)])
        rows.append(inputs[:, 0])
    assert [part.tolist() for part in rows] == [list(range(24)), list(range(24, 30))]


@pytest.mark.parametrize(
    ("validation", "message"),
    [
        ({}, "validation.share: give either a share, as in {share: 0.1}, or a split"),
        ({"share": 0.1, "split": "x"}, "validation.share: give either a share, as in {share: 0.1}, or a split"),
        ({"share": 1.0}, "validation.share: must be a number above 0 and below 1 or null, not 1.0"),
        ({"split": "test"}, "validation.split: must be a split apart from train and test, not 'test'"),
        (
            {"split": "valid"},
            "validation.split: data digits has no split valid, but train and test; take a share of its training "
            "samples, as in validation: {share: 0.1}",
        ),
    ],
)
def test_mistakes_about_it(validation: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_data({"epochs": 1, "validation": validation})
    told = str(caught.value).removeprefix("the configuration: ")
    assert told.startswith(message), told
    assert "\n" not in told


def test_it_must_stay_when_a_run_is_resumed_but_for_the_test() -> None:
    before = from_data({"epochs": 1, "validation": SHARE})
    assert [key for key, *_ in refused_changes(before, from_data({"epochs": 1}))] == ["validation.share"]
    assert [key for key, *_ in refused_changes(from_data({"epochs": 1}), before)] == ["validation.share"]
    assert not list(refused_changes(before, from_data({"epochs": 1, "validation": SHARE | {"test": False}})))


# -- a run -------------------------------------------------------------------------------------------------------------


def lines(folder: RunFolder) -> list[tuple[str, int]]:
    """Of each evaluation that a run has written down: the split and the step."""
    return [(line["split"], line["step"]) for line in read_history(folder) if line["split"] != "train"]


def measured(folder: RunFolder) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in line.items() if key not in ("time", *PACE_KEYS)} for line in read_history(folder)
    ]


def outcome(name: str, **changes: Any) -> tuple[RunFolder, dict[str, Any]]:
    """A run of three epochs of 22 steps, and what its worker tells of its end."""
    told = Monitor()
    ended: list[Any] = []

    def keep(self: RunProgress, *arguments: Any) -> dict[str, Any]:
        ended.append(finish(self, *arguments))
        return ended[-1]

    finish = RunProgress.finish
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunProgress, "finish", keep)
        folder = train(name, told, validation=SHARE, **changes)
    evaluations = [arguments[0] for kind, arguments in told.told if kind == "evaluated"]
    assert all(evaluation.split == "validation" for evaluation in evaluations)
    return folder, ended[-1]


def test_a_run_is_judged_by_it_and_tested_once_with_its_last_model() -> None:
    folder, end = outcome("judged")
    evaluations = read_evaluations(folder)
    assert lines(folder) == [("validation", 21), ("validation", 42), ("validation", 63), ("test", 63)]
    assert [(each.step, each.split) for each in evaluations] == [(step, "validation") for step in (21, 42, 63)]
    assert end["metrics"] == evaluations[-1].metrics
    assert end["test_metrics"] == {key: value for key, value in measured(folder)[-1].items() if key in end["metrics"]}
    assert end["test_metrics"] != end["metrics"]

    splits = load_splits(from_data({"epochs": 1, "seed": 7, "validation": SHARE}), CPU)
    for split, metrics in ((splits.judged, end["metrics"]), (splits.test, end["test_metrics"])):
        assert split is not None
        accuracy, loss = figures(final(folder), split)
        assert metrics["accuracy"] == pytest.approx(accuracy, abs=1e-12)
        assert metrics["loss"] == pytest.approx(loss, rel=1e-5)


def figures(weights: dict[str, Tensor], split: Split) -> tuple[float, float]:
    """Accuracy and loss of the small run's model in plain PyTorch."""
    [(images, labels)] = split.read([Request(torch.arange(len(split)), 0, epoch=0)])
    hidden = (images.flatten(1) @ weights["1.weight"].T + weights["1.bias"]).relu()
    outputs = hidden @ weights["4.weight"].T + weights["4.bias"]
    return (outputs.argmax(1) == labels).double().mean().item(), torch.nn.functional.cross_entropy(
        outputs, labels
    ).item()


def test_it_goes_on_with_the_same_bits_and_is_tested_once() -> None:
    whole, end = outcome("whole")
    parted, _ = outcome("parted")
    outcome("parted")  # as if it had been killed after its last checkpoint
    assert measured(parted) == measured(whole)
    parted.delete("checkpoint_00000063")  # as if it had been killed before that
    _, again = outcome("parted")
    assert_bitwise_equal(final(whole), final(parted))
    assert measured(parted) == measured(whole)
    assert again["test_metrics"] == end["test_metrics"]
    outcome("parted", epochs=4)
    assert lines(parted)[-3:] == [("validation", 63), ("validation", 84), ("test", 84)]


def test_what_is_not_to_be_tested_is_not() -> None:
    told = Monitor()
    folder = train("untested", told, epochs=1, validation=SHARE | {"test": False})
    assert lines(folder) == [("validation", 21)]


def test_checkpoints_and_the_end_follow_from_it(project: Path) -> None:
    """The metric is better and better on the test split, and worse and worse on the other."""
    own = "calls = []\ndef odd(model, batch):\n    calls.append(len(batch[1]))\n"
    own += "    return (-len(calls) if calls[-1] == 150 else 100.0), 1\n"
    (project / "mine.py").write_text(own, encoding="utf-8")
    folder, end = outcome("early", epochs=9, metrics=["mine.py:odd"], stop={"patience": 2}, checkpoint={"keep": 1})
    assert lines(folder) == [("validation", 21), ("validation", 42), ("validation", 63), ("test", 63)]
    assert end["ended_early"] == "no better odd in 2 evaluations"
    assert [name for name in folder.folders() if name.startswith("checkpoint")] == [
        "checkpoint_00000021",
        "checkpoint_00000063",
    ]
    manifest = json.loads(folder.read_bytes("checkpoint_00000021/checkpoint.json"))
    assert manifest["metrics"]["odd"] == -1


def test_a_picture_has_the_curve_of_one_and_the_point_of_the_other(tmp_path: Path) -> None:
    folder, _ = outcome("drawn", epochs=2)
    panels = {}
    for place in write_figure(folder).axes:
        panels[place.get_title()] = {line.get_label(): len(line.get_xdata()) for line in place.lines}
    assert panels["accuracy"] == {"validation": 2, "test": 1}
    assert panels["loss"] | {"train": 0} == {"train": 0, "validation": 2, "test": 1}


def write_figure(folder: RunFolder) -> Any:
    """The figure that a report is drawn on."""
    drawn: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "as_png", lambda figure: drawn.append(figure) or b"")
        curves.write_report(folder)
    return drawn[0]
