"""The loop of a single worker, without Ray: what it saves in an object store, and how it goes on from there."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Timer
from typing import Any

import pytest
import torch
from lone_runs import final
from stored_runs import Monitor, project_with_store, train
from whole_runs import assert_bitwise_equal

from raytorch.errors import CheckpointError, ConfigError, DivergedError
from raytorch.runs.catalog import read_history
from raytorch.runs.checkpoint_manifest import latest_checkpoint, read_manifest
from raytorch.runs.storage import RunFolder
from raytorch.training.loop import Trainer
from raytorch.training.saved_state import open_checkpoint


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with an object store; no Ray."""
    with project_with_store(tmp_path, monkeypatch) as folder:
        yield folder


def test_the_end_waits_for_the_last_checkpoint_to_be_sent_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    may_go, upload, told = Event(), RunFolder.upload, Monitor()

    def send_slowly(self: RunFolder, local: Path, name: str = "") -> None:
        if name == "checkpoint_00000024":
            Timer(0.2, may_go.set).start()
            assert may_go.wait(60)
        upload(self, local, name)

    monkeypatch.setattr(RunFolder, "upload", send_slowly)
    folder = train("patient", told, epochs=1)
    assert latest_checkpoint(folder) == "checkpoint_00000024"
    names = [name for name, _ in told.told]
    assert names.count("saved") == 3  # at steps 10, 20 and 24
    phases = [arguments[0]["phase"] for name, arguments in told.told if name == "progress"]
    assert phases[-1] == "saving"


def test_a_lost_end_is_made_up_for_with_the_same_bits() -> None:
    whole = train("whole")
    parted = train("parted")
    parted.delete("checkpoint_00000072")  # as if it had not been sent when the kill came
    assert latest_checkpoint(parted) != "checkpoint_00000072"
    train("parted")
    assert latest_checkpoint(parted) == "checkpoint_00000072"
    assert_bitwise_equal(final(whole), final(parted))


def test_a_run_ends_when_it_no_longer_gets_better_and_goes_on_with_more_patience() -> None:
    stop = {"metric": "loss", "patience": 2, "min_change": 100.0}  # which nothing after the first evaluation reaches
    folder, told = train("early", epochs=9, stop=stop), Monitor()
    assert latest_checkpoint(folder) == "checkpoint_00000072"
    whole = final(folder)
    folder.delete("checkpoint_00000072")  # as if it had been killed before it was sent
    train("early", epochs=9, stop=stop)
    assert latest_checkpoint(folder) == "checkpoint_00000072"
    assert_bitwise_equal(final(folder), whole)
    train("early", told, epochs=9, stop=stop | {"patience": 4})
    assert latest_checkpoint(folder) == "checkpoint_00000120"
    train("early", epochs=9, stop=None)
    assert latest_checkpoint(folder) == "checkpoint_00000216"


def test_a_loss_of_a_sum_and_a_count_trains_and_is_reported_as_the_mean_of_its_numbers(
    project: Path,
) -> None:
    changes: dict[str, Any] = {"epochs": 1, "accumulate": 2, "clip_norm": 0.5, "optimizer": {"name": "sgd", "lr": 0.1}}
    own = "def total(model, batch):\n    losses = cross_entropy(model(batch[0]), batch[1], reduction='none')\n"
    own += "    return losses.sum(), len(losses)\n"
    (project / "mine.py").write_text(f"from torch.nn.functional import cross_entropy\n{own}", encoding="utf-8")
    means, sums = train("means", **changes), train("sums", loss="mine.py:total", **changes)
    torch.testing.assert_close(final(sums), final(means))
    for ours, theirs in zip(read_history(sums), read_history(means), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours.get("accuracy") == theirs.get("accuracy")


def test_a_model_that_could_not_be_loaded_again_is_refused_before_it_is_trained(project: Path) -> None:
    own = "from torch import nn, zeros\nclass Many(nn.ParameterList):\n    def __init__(self):\n"
    own += "        super().__init__(nn.Parameter(zeros(1)) for _ in range(25_001))\n"
    (project / "mine.py").write_text(own, encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"^model.name: mine.py:Many makes a model of 25,001 tensors, and one that can"
    ):
        train("many", model="mine.py:Many")


def test_metrics_of_the_runs_own_choice_are_measured_and_rank_checkpoints(project: Path) -> None:
    own = "values = iter([3.0, 1.0, 2.0, 4.0])\ndef errors(model, batch):\n    return next(values), 1\n"
    (project / "mine.py").write_text(own, encoding="utf-8")
    metrics = [{"name": "mine.py:errors", "better": "lower"}]
    checkpoint = {"keep": 1, "best_by": "errors"}
    folder = train("own", metrics=metrics, epochs=4, checkpoint=checkpoint, stop={"patience": 2})
    assert [line["errors"] for line in read_history(folder) if line["split"] == "test"] == [3.0, 1.0, 2.0, 4.0]
    assert [name for name in folder.folders() if name.startswith("checkpoint")] == [
        "checkpoint_00000048",  # the best
        "checkpoint_00000096",
    ]


def test_metrics_that_are_not_finite_leave_records_that_every_reader_takes(project: Path, tmp_path: Path) -> None:
    own = "def odd(model, batch):\n    return float('nan'), 1\ndef high(model, batch):\n    return float('inf'), 1\n"
    (project / "mine.py").write_text(own, encoding="utf-8")
    changes: dict[str, Any] = {"metrics": ["mine.py:odd", "mine.py:high"], "stop": {"metric": "high", "patience": 9}}
    folder = train("odd", **changes, epochs=1)
    train("odd", **changes, epochs=2)
    files = [path for path in (tmp_path / "odd").rglob("*.json*") if path.suffix in (".json", ".jsonl")]
    assert {path.name for path in files} == {"metrics.jsonl", "checkpoint.json", "state.json"}
    for path in files:
        for text in (
            path.read_text(encoding="utf-8").splitlines() if path.suffix == ".jsonl" else [path.read_text("utf-8")]
        ):
            json.loads(text, parse_constant=pytest.fail)
    tests = [line for line in read_history(folder) if line["split"] == "test"]
    assert [(line["step"], math.isnan(line["odd"]), line["high"]) for line in tests] == [
        (24, True, math.inf),
        (48, True, math.inf),
    ]
    manifest = read_manifest(folder, str(latest_checkpoint(folder)))
    assert math.isnan(manifest.metrics["odd"])


def test_a_checkpoint_behind_the_end_has_nothing_left_to_train() -> None:
    folder = train("far", epochs=2)
    train("far", epochs=1)
    assert latest_checkpoint(folder) == "checkpoint_00000048"


def test_an_average_of_the_weights_is_saved_and_goes_on_with_the_same_bits() -> None:
    ema = {"decay": 0.9}
    whole = train("whole", ema=ema)
    parted = train("parted", ema=ema)
    parted.delete("checkpoint_00000072")
    train("parted", ema=ema)
    assert_bitwise_equal(final(whole), final(parted))
    plain = train("plain")
    trained = trained_weights(whole)
    assert_bitwise_equal(trained, final(plain))  # the average is no part of the training
    assert not torch.equal(final(whole)["1.weight"], trained["1.weight"])
    train("whole", epochs=4)  # goes on with the weights that were trained, and without an average
    train("plain", epochs=4)
    assert_bitwise_equal(final(whole), final(plain))


def test_an_average_that_is_new_begins_with_the_weights_that_are_there() -> None:
    for name in ("with", "without"):
        train(name, epochs=1)
    folder = train("with", epochs=2, ema={"decay": 0.5})
    assert_bitwise_equal(trained_weights(folder), final(train("without", epochs=2)))


def trained_weights(folder: RunFolder) -> dict[str, Any]:
    with open_checkpoint(folder, str(latest_checkpoint(folder))) as saved:
        trained: dict[str, Any] = saved.state()["averages"]["model"]["trained"]
    return trained


def test_groups_of_parameters_may_change_on_the_way_and_have_to_be_there() -> None:
    optimizer: dict[str, Any] = {"name": "adamw", "lr": 0.002}
    train("grouped", epochs=1, optimizer=optimizer)
    train("grouped", epochs=2, optimizer=optimizer | {"groups": [{"match": "*.bias", "weight_decay": 0.0}]})
    with pytest.raises(ConfigError, match=r"^optimizer.groups\[0\].match: no parameter has a name like 'head.*'"):
        train("grouped", epochs=3, optimizer=optimizer | {"groups": [{"match": "head.*", "lr": 0.1}]})


def test_what_has_changed_counts_from_the_next_step_on(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = Trainer.train_step

    def step_told(self: Trainer, batches: Any) -> None:
        rates.append(self.steps.rate)
        step(self, batches)

    train("changed", epochs=1, schedule="constant")
    monkeypatch.setattr(Trainer, "train_step", step_told)
    optimizer = {"name": "adamw", "lr": 0.002, "betas": [0.5, 0.6], "amsgrad": True}
    train("changed", epochs=2, schedule={"name": "step", "every_epochs": 1.5}, optimizer=optimizer)
    assert rates == [0.002] * 12 + [0.002 * 0.1] * 12


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": {"name": "plateau", "patience": 0, "threshold": 0.5, "factor": 0.5, "warmup_steps": 5}},
        {"precision": "fp16", "clip_norm": 1.0, "ema": {"decay": 0.9}, "optimizer": {"name": "adamw", "lr": 0.01}},
        {"optimizer": {"name": "muon", "lr": 0.02, "others": {"match": ["4.*"]}}},
    ],
)
def test_a_killed_run_of_any_optimizer_schedule_or_precision_ends_with_the_same_bits(changes: dict[str, Any]) -> None:
    whole, parted = train("whole", **changes), train("parted", **changes)
    for name in sorted(folder for folder in parted.folders() if folder.startswith("checkpoint"))[1:]:
        parted.delete(name)
    train("parted", **changes)
    assert_bitwise_equal(final(whole), final(parted))
    rates = [[line.get("lr") for line in read_history(folder)] for folder in (whole, parted)]
    assert rates[0] == rates[1]
    assert [line["accuracy"] for line in read_history(whole) if line["split"] == "test"][-1] > 0.5


def test_a_plateau_lowers_the_rate_from_the_next_step_on() -> None:
    plateau = {"name": "plateau", "patience": 0, "threshold": 10.0, "factor": 0.5}  # which no evaluation reaches
    logging = {"every_steps": 8, "tensorboard": False}
    folder = train("plateau", schedule=plateau, checkpoint={"every_epochs": 1}, logging=logging)
    rates = [line["lr"] for line in read_history(folder) if line["split"] == "train"]
    assert rates == [0.01] * 6 + [0.005] * 3


def test_losses_that_overflow_in_fp16_are_left_out_and_no_divergence(project: Path) -> None:
    own = "calls = [0]\ndef spoilt(model, batch):\n    loss = cross_entropy(model(batch[0]), batch[1])\n"
    own += "    calls[0] += loss.requires_grad\n    return loss * (float('inf') if calls[0] in (3, 8) else 1.0)\n"
    for name in ("half.py", "full.py"):
        (project / name).write_text(f"from torch.nn.functional import cross_entropy\n{own}", encoding="utf-8")
    folder = train("half", precision="fp16", loss="half.py:spoilt", epochs=1, ema={"decay": 0.5})
    losses = [line["loss"] for line in read_history(folder) if line["split"] == "train"]
    assert len(losses) >= 12
    assert all(0 < loss < 5 for loss in losses)
    with pytest.raises(
        DivergedError, match=r"the loss became inf at step 3 of 24; lower optimizer.lr .*precision: fp32"
    ):
        train("full", precision="fp32", loss="full.py:spoilt", epochs=1)


def test_a_model_that_the_last_step_ruins_is_not_saved() -> None:
    with pytest.raises(DivergedError, match=r"the test loss became (nan|inf) at step 1 of 1; lower optimizer.lr"):
        train("ruined", optimizer={"name": "sgd", "lr": 1e38}, schedule="constant", epochs=None, steps=1)
    assert latest_checkpoint(RunFolder("s3://bucket", "ruined")) is None


def test_a_model_that_does_not_fit_the_data_is_the_users_to_change() -> None:
    with pytest.raises(ConfigError, match=r"^batch_size \(1\): "):  # it would normalize a batch of one
        train("misfit", model="resnet18", batch_size=1)


def test_a_checkpoint_that_fits_another_configuration_is_not_to_be_deleted() -> None:
    folder = train("other", epochs=1)
    with pytest.raises(CheckpointError, match=r"does not fit the run .*size mismatch.*; resume with those") as failure:
        train("other", model={"name": "mlp", "hidden": [3]})
    assert str(failure.value).startswith(folder.file(str(latest_checkpoint(folder))))
    assert "delete" not in str(failure.value)


def test_a_checkpoint_that_is_damaged_is_named_with_what_to_do(tmp_path: Path) -> None:
    folder = train("damaged", epochs=1)
    path = tmp_path / folder.name / str(latest_checkpoint(folder)) / "state.json"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"is damaged: .*; or delete that checkpoint to resume"):
        train("damaged")
