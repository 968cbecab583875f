"""Runs that begin with weights of a file or another run: where they are looked for, what of them fits and is told."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lone_runs import Monitor, final, train, without_ray
from run_folders import started
from torch import nn
from whole_runs import assert_bitwise_equal

from raytorch.config import MlpModel, RunConfig
from raytorch.config.file import dump_config
from raytorch.errors import ConfigError, ModelFileError, UserError
from raytorch.runs.checkpoint_manifest import latest_checkpoint
from raytorch.runs.plan import placed, plan_run
from raytorch.runs.storage import RunFolder
from raytorch.scaling.study import plan_study
from raytorch.serialization import save_tensors
from raytorch.service import destination
from raytorch.service.destination import Destination
from raytorch.training import initial_weights
from raytorch.training.export import load_run
from raytorch.training.initial_weights import begin_with_weights

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with without_ray(tmp_path, monkeypatch):
        yield


# -- where they are ----------------------------------------------------------------------------------------------------


def weights_of(config: RunConfig) -> str | None:
    return placed(config, "new", "elsewhere").model.weights


def config(**model: Any) -> RunConfig:
    return RunConfig.model_validate({"epochs": 1, "model": {"name": "mlp", **model}})


def test_a_file_is_from_the_current_folder_and_a_run_from_the_storage(tmp_path: Path) -> None:
    assert weights_of(config()) is None
    assert weights_of(config(weights="stem.pt")) == f"{tmp_path}/stem.pt"
    assert weights_of(config(weights="sub/stem.safetensors")) == f"{tmp_path}/sub/stem.safetensors"
    assert weights_of(config(weights="digits-1.2")) == f"{tmp_path}/runs/digits-1.2"
    assert weights_of(config(weights="others/digits")) == f"{tmp_path}/others/digits"
    assert weights_of(config(weights="s3://bucket/stem.pt?region=x")) == "s3://bucket/stem.pt?region=x"
    twice = placed(placed(config(weights="digits"), "a", "elsewhere"), "b", "third")
    assert twice.model.weights == f"{tmp_path}/runs/digits"


def test_no_file_is_in_a_jobs_folder_but_runs_are_in_its_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYTORCH_STORAGE_BASE", "/shared/runs")
    assert weights_of(config(weights="runs/digits")) == weights_of(config(weights="digits")) == "/shared/runs/digits"
    assert weights_of(config(weights="/data/stem.pt")) == "/data/stem.pt"
    with pytest.raises(
        UserError, match=r"^model.weights: stem.pt would be in the job's own folder on the cluster; give"
    ):
        weights_of(config(weights="stem.pt"))


def test_a_run_that_is_not_there_is_told_before_anything_starts() -> None:
    started(RunConfig(epochs=1), "digits")
    with pytest.raises(
        ConfigError, match=r"^model.weights: no run digit in .*/runs \(did you mean 'digits'\?\); .*\.pt"
    ):
        plan_run(config(weights="digit"))
    RunFolder("runs", "empty").make()
    RunFolder("runs", "empty").write_text("config.yaml", dump_config(RunConfig(epochs=1)))
    with pytest.raises(ConfigError, match=r"^model.weights: .*/runs/empty has no complete checkpoint; train it first$"):
        plan_run(config(weights="empty"))
    place = str(Path("runs/digits").absolute())
    assert plan_run(config(weights="digits")).config.model.weights == place
    Path("run.yaml").write_text(dump_config(config(weights="digits")), encoding="utf-8")
    assert [plan.config.model.weights for plan in plan_study("run.yaml", [1, 2]).plans] == [place, place]


# -- what of them fits -------------------------------------------------------------------------------------------------


def net(width: int = 3) -> nn.Module:
    torch.manual_seed(width)
    return nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width), nn.Linear(width, 4))


def begun(weights: str, model: nn.Module, *, strict: bool = True) -> dict[str, Any] | None:
    return begin_with_weights(model, MlpModel(weights=str(Path(weights).absolute()), strict=strict), CPU)


@pytest.mark.parametrize("name", ["all.safetensors", "all.pt"])
def test_a_file_has_all_that_a_model_has(name: str) -> None:
    saved, model = net(), net(3)
    with torch.no_grad():
        saved[0].weight += 1  # type: ignore[operator]
        saved[1].running_mean += 2  # type: ignore[operator]
    if name.endswith(".pt"):
        torch.save(saved.state_dict(), name)
    else:
        save_tensors(saved.state_dict(), Path(name))
    told = begun(name, model)
    assert_bitwise_equal(dict(model.state_dict()), dict(saved.state_dict()))
    digest = hashlib.sha256(Path(name).read_bytes()).hexdigest()
    nothing = {"missing": [], "unexpected": [], "of_other_shape": {}}
    assert told == {"source": str(Path(name).absolute()), "sha256": digest, **nothing}


def test_what_does_not_fit_is_refused_or_told(caplog: pytest.LogCaptureFixture) -> None:
    state = net().state_dict()
    given = {**state, "2.weight": torch.ones(5, 3), "3.bias": torch.ones(1)}
    del given["1.running_var"], given["2.bias"]
    torch.save(given, "odd.pt")
    with pytest.raises(ConfigError) as refused:
        begun("odd.pt", net())
    assert str(refused.value) == (
        f"model.weights: {Path('odd.pt').absolute()} is not of this model: missing: 1.running_var, 2.bias; unexpected: "
        "3.bias; of other shape: 2.weight (5, 3), not (4, 3); give weights of the same model, or take what fits with "
        "model.strict: false"
    )
    model, own = net(4), net(4).state_dict()
    torch.save({**own, "0.weight": torch.zeros(4, 2), "2.bias": torch.zeros(9)}, "some.pt")
    told = begun("some.pt", model, strict=False)
    assert told
    assert told["of_other_shape"] == {"2.bias": "(9,), not (4,)"}
    assert_bitwise_equal(dict(model.state_dict()), {**own, "0.weight": torch.zeros(4, 2)})
    assert caplog.messages[-1].endswith("some.pt: of other shape: 2.bias (9,), not (4,)")


def test_a_file_is_the_same_for_all_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where each node has a folder of the same name."""
    torch.save(net().state_dict(), "mine.pt")
    monkeypatch.setattr(initial_weights, "all_gather", lambda row: torch.stack([row, row, row + 1]))
    with pytest.raises(
        ConfigError, match=r"^model.weights: .*mine.pt has another content for rank 2 than for rank 0; "
    ):
        begun("mine.pt", net())


def test_a_state_dict_of_a_wrapper_is_told() -> None:
    torch.save({f"module.{name}": value for name, value in net().state_dict().items()}, "ddp.pt")
    with pytest.raises(
        ConfigError, match=r"module.0.bias, .* \(all are of a module 'module': save the state dict of that"
    ):
        begun("ddp.pt", net())


def test_a_cluster_elsewhere_needs_weights_that_it_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(destination, "run_here", lambda nodes: False)
    there: Any = SimpleNamespace(url="http://head", nodes=lambda: SimpleNamespace(up=[]))
    run = config(weights="/shared/stem.pt").model_copy(update={"storage": "/shared/runs"})
    assert Destination(there).config(run).model.weights == "/shared/stem.pt"
    for weights, kind in (("stem.pt", "file"), ("runs/digits", "folder")):
        own = run.model_copy(update={"model": MlpModel(weights=weights)})
        with pytest.raises(
            UserError, match=rf"^model.weights: {weights} is a {kind} of this machine, .* give a {kind} "
        ):
            Destination(there).config(own)
    named = run.model_copy(update={"model": MlpModel(weights="digits")})
    assert Destination(there).config(named).model.weights == "/shared/runs/digits"


def test_a_long_list_is_cut() -> None:
    torch.save({f"layer{number}": torch.ones(1) for number in range(30)}, "other.pt")
    for strict in (True, False):
        with pytest.raises(ConfigError, match=r"unexpected: layer0, .*layer9, and 20 more") as refused:
            begun("other.pt", net(), strict=strict)
    assert f"nothing in {Path('other.pt').absolute()} fits this model: missing: 0.weight, " in str(refused.value)


def test_a_file_runs_nothing_and_is_named() -> None:
    torch.save(net(), "whole.pt")
    with pytest.raises(
        ModelFileError, match=r"^model.weights: .*whole.pt names .* which is no tensor and could run code"
    ):
        begun("whole.pt", net())
    with pytest.raises(ModelFileError, match=r"^model.weights: .*gone.pt: no such file$"):
        begun("gone.pt", net())


# -- runs --------------------------------------------------------------------------------------------------------------


def test_a_run_begins_with_the_latest_checkpoint_of_another() -> None:
    first = train("first", epochs=2)
    weights = {"weights": "first", "freeze": ["1.*"]}
    told = Monitor()
    second = train("second", weights, told)
    file = f"{first}/{latest_checkpoint(first)}/model.safetensors"
    began = told.told["progress"][0]["initial_weights"]
    assert (began["source"], began["sha256"]) == (file, hashlib.sha256(Path(file).read_bytes()).hexdigest())
    kept = {name: value for name, value in final(first).items() if name.startswith("1.")}
    assert_bitwise_equal({name: final(second)[name] for name in kept}, kept)
    assert not torch.equal(final(second)["4.weight"], final(first)["4.weight"])
    named = train("named", weights | {"weights": "runs/first/checkpoint_00000048"})
    assert_bitwise_equal(final(named), final(second))
    model, architecture = load_run(second)
    assert architecture.config == MlpModel(hidden=[32], dropout=0.2)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_frozen_parameters_go_through_checkpoints_averages_and_resumes() -> None:
    changes: dict[str, Any] = {"ema": {"decay": 0.9}, "clip_norm": 1.0, "schedule": "constant"}
    torch.save(final(train("first")), "first.pt")
    frozen = {"weights": "first.pt", "freeze": ["1.*"], "checkpointing": ["1", "4"]}
    whole = train("whole", frozen, epochs=2, **changes)
    parted = train("parted", frozen, **changes)
    Path("first.pt").unlink()  # which a resumed run does not read
    assert_bitwise_equal(final(train("parted", frozen, epochs=2, **changes)), final(whole))
    assert_bitwise_equal(
        {"1.weight": final(parted)["1.weight"]}, {"1.weight": final(RunFolder("runs", "first"))["1.weight"]}
    )
    thawed = train("parted", frozen | {"weights": "other.pt", "freeze": []}, epochs=3, **changes)
    assert not torch.equal(final(thawed)["1.weight"], final(whole)["1.weight"])
    assert f"weights: {Path('first.pt').absolute()}" in Path("runs/parted/config.yaml").read_text(encoding="utf-8")
    with pytest.raises(ModelFileError, match=r"^model.weights: .*first.pt: no such file"):
        train("new", frozen)


def test_a_run_without_a_checkpoint_takes_the_weights_that_it_is_given() -> None:
    """Of which the first may have been misspelt."""
    torch.save(final(train("first")), "first.pt")
    with pytest.raises(ModelFileError):
        train("again", {"weights": "frist.pt"})
    train("again", {"weights": "first.pt"})
    assert json.loads(Path("runs/again/checkpoint_00000024/checkpoint.json").read_text(encoding="utf-8"))["step"] == 24
