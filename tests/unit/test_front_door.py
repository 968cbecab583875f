"""``raytorch.train`` and what goes with it, as far as it goes without Ray."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import raytorch
from raytorch import config
from raytorch.errors import (
    ConfigError,
    MissingPackageError,
    RaytorchError,
    RunExistsError,
    RunNotFoundError,
    UserError,
)
from raytorch.training.history import History


def test_the_front_door_loads_nothing_until_it_is_used() -> None:
    code = "import raytorch, sys; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not set(loaded) & {"torch", "ray", "pydantic", "yaml"}


@pytest.mark.parametrize("kind", ["file", "dict", "config"])
@pytest.mark.parametrize("overrides", [{"optimizer.lr": 1e-5, "name": "no"}, ["optimizer.lr=1e-5", 'name="no"']])
def test_a_configuration_is_a_file_a_dict_or_one_that_is_read(kind: str, overrides: Any, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("epochs: 1\ndata: digits\n", encoding="utf-8")
    given: Any = {"file": tmp_path / "run.yaml", "dict": {"epochs": 1, "data": "digits"}}.get(kind)
    config = raytorch.load(given or raytorch.RunConfig(epochs=1), overrides)
    assert (config.epochs, config.optimizer.lr, config.name) == (1, 1e-5, "no")


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({"epochs": 1, "optimiser": "adam"}, {}, "optimiser"),
        ({"epochs": 1, "seed": object()}, {}, "plain"),
        (None, {}, "dictionary or a RunConfig, not None"),
        ([1], {}, "dictionary or a RunConfig"),
        ({"epochs": 1}, {"set": 5}, "not 5"),
        ({"epochs": 1}, {"set": [("epochs", 2)]}, "epochs=3"),
        ({}, {}, "epochs"),
        ({"epochs": 1}, {"set": {"optimizer.lr": "high"}}, "optimizer.lr"),
        ({"epochs": 1}, {"set": "epochs=3"}, "set: must be"),
        ({"epochs": 1}, {"workers": 0}, "scaling"),
        ({"epochs": 1}, {"name": "a/b"}, "a/b"),
        ({"epochs": 1}, {"address": "http://127.0.0.1:8265"}, "dashboard"),
        ("nowhere.yaml", {}, "no such file"),
        ({"epochs": 1, "data": {"name": "mnist", "root": "nowhere"}}, {}, "nowhere"),
    ],
)
def test_a_mistake_is_an_error_of_raytorch_and_leaves_nothing(
    config: Any, options: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match=message):
        raytorch.train(config, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RunNotFoundError, match="nothing"):
        raytorch.resume("nothing", storage=tmp_path)
    assert raytorch.list_runs(tmp_path) == []


def test_a_storage_that_refuses_is_an_error_of_raytorch(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(RaytorchError):
        raytorch.train({"epochs": 1, "data": "digits"}, name="mine", storage=tmp_path / "file")


def test_a_wrong_key_is_told_with_its_place() -> None:
    with pytest.raises(ConfigError, match=r"^the configuration: optimiser: "):
        raytorch.load({"epochs": 1, "optimiser": "adam"})


def test_paths_and_numbers_of_numpy_and_pytorch_are_taken_for_what_they_are(tmp_path: Path) -> None:
    run = {"epochs": np.int64(2), "model": {"name": "convnet", "channels": np.array([8, 16])}, "storage": tmp_path}
    config = raytorch.load(run, {"optimizer.lr": torch.tensor(0.5), "batch_size": np.int32(8)})
    assert (config.epochs, config.optimizer.lr, config.batch_size) == (2, 0.5, 8)
    assert config.storage == str(tmp_path)
    assert config.model.model_dump()["channels"] == [8, 16]


def endless() -> list[Any]:
    values: list[Any] = []
    values.append(values)
    return values


@pytest.mark.parametrize("value", [endless(), 10**5000, np.float32], ids=["in itself", "long", "a class"])
def test_what_yaml_has_no_word_for_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="give plain numbers, texts, lists and mappings"):
        raytorch.load({"epochs": 1, "seed": value})


class Net(torch.nn.Linear):
    """A model of one's own."""


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"modle": Net}, "modle: unknown key; allowed: name, seed, "),
        (
            {"optimizer": torch.optim.AdamW},
            "optimizer: is the class AdamW; give plain numbers, texts, lists and mappings",
        ),
        ({"optimizer": {"name": torch.optim.AdamW}}, "optimizer.name: is the class AdamW; give plain numbers"),
        ({"model": {"name": "mlp", "hidden": [3, torch.relu]}}, "model.hidden[1]: is the function relu; give plain"),
        ({"stop": torch.nn.ReLU()}, "stop: is ReLU(), a ReLU; give plain numbers, texts, lists and mappings"),
        ({"metrics": Net}, "metrics: must be a list, also of a single one: metrics=[...]"),
        ({"metrics": {"name": Net, "better": "lower"}}, "metrics: must be a list, also of a single one: metrics=[...]"),
        ({"set": {"optimizer.lr": Net}}, "optimizer.lr: is the class Net; give plain numbers"),
    ],
)
def test_a_class_or_object_where_none_can_stand_is_told_with_its_key(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        raytorch.load(epochs=1, **keys) if "set" not in keys else raytorch.load({"epochs": 1}, **keys)
    assert str(caught.value).startswith(f"the configuration: {message}")


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: raytorch.RunConfig(epochs=-1), "epochs: must be a whole number of at least 1 or null, not -1"),
        (lambda: raytorch.RunConfig(), "epochs: give epochs or steps"),
        (lambda: raytorch.RunConfig(epochs=1, optimiser="adam"), "optimiser: unknown key; allowed: name, seed, "),
        (
            lambda: raytorch.RunConfig(epochs=1, model=torch.nn.Linear),
            "classes and functions are taken by raytorch.load",
        ),
        (lambda: config.MlpModel(hidden=[]), "hidden: must be a list of 1 or more, each a whole number of at least 1"),
        (lambda: config.Adam(lr=float("nan")), "lr: must be a number above 0, not .nan"),
    ],
)
def test_a_mistake_in_what_is_made_in_python_is_told_as_that_of_a_file(made: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        made()
    assert str(caught.value).startswith(f"the configuration: {message}")


def test_a_section_of_a_run_is_taken_as_it_is() -> None:
    model, scaling = config.ConvNetModel(channels=[8]), config.Scaling(workers=2)
    run = raytorch.load({"epochs": 1, "model": model}, {"scaling.backend": "gloo"})
    assert raytorch.load(epochs=1, model=model, scaling=scaling).model == run.model == model
    assert raytorch.load(epochs=1, scaling=scaling).scaling == scaling


def test_keys_do_not_stand_beside_a_configuration() -> None:
    with pytest.raises(ConfigError, match=r"epochs: beside a configuration, give what changes in it"):
        raytorch.load({"data": "digits"}, epochs=1)
    with pytest.raises(ConfigError, match=r"a dictionary or a RunConfig, not None; or give its keys"):
        raytorch.train()


def test_what_remedies_are_called_in_python(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/config.yaml").write_text("epochs: 1\n", encoding="utf-8")
    with pytest.raises(RunExistsError) as caught:
        raytorch.train({"epochs": 1}, name="mine", storage=tmp_path)
    assert caught.value.__notes__ == [f"try: name=... or raytorch.resume({str(tmp_path / 'mine')!r})"]


LINES = [
    {"step": 20, "time": 1.5e9, "split": "train", "loss": 0.123456789},
    {"step": 20, "time": 1.5e9, "split": "test", "loss": 0.25, "top<3>": 1.0},
]


def test_what_was_measured_is_a_table() -> None:
    history = History(LINES)
    assert list(history) == LINES
    assert str(history).splitlines() == [
        "step  time        split  loss      top<3>",
        "20    1500000000  train  0.123457",
        "20    1500000000  test   0.25      1",
    ]
    assert "<td>0.25</td><td>1</td></tr>" in history._repr_html_()
    assert "<th>top&lt;3&gt;</th>" in history._repr_html_()
    assert (str(History()), History().columns) == ("", [])


def test_what_was_measured_is_a_data_frame_where_pandas_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingPackageError, match="pip install pandas"):
        History(LINES).to_pandas()
    monkeypatch.undo()
    pandas = pytest.importorskip("pandas")
    frame = History(LINES).to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert (list(frame.columns), frame["loss"].tolist()) == (History(LINES).columns, [0.123456789, 0.25])


def test_no_workers_are_refused_by_a_resumed_run_too(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text("epochs: 1\ndata: digits\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"scaling\.workers"):
        raytorch.resume("mine", workers=0, storage=tmp_path)


def test_a_result_reads_where_its_address_leads_and_shows_no_secret(tmp_path: Path) -> None:
    address = "s3://key:secret@bucket/runs/mine?region=eu"
    result = raytorch.Result("mine", "s3://***@bucket/runs/mine?region=eu", "finished", {}, {}, address)
    assert result._folder.address == address
    assert "secret" not in repr(result)


def test_a_result_is_shown_without_all_of_its_record() -> None:
    shown = repr(raytorch.Result("mine", "runs/mine", "finished", {"loss": 0.5}, {"versions": {"python": "3.11"}}))
    assert shown == "Result(name='mine', path='runs/mine', state='finished', metrics={'loss': 0.5})"


def test_what_names_no_run_is_refused(tmp_path: Path) -> None:
    for call in (raytorch.find_run, raytorch.resume):
        with pytest.raises(UserError, match="a run is given by its name"):
            call(None)  # type: ignore[operator]
    gone = raytorch.Result("gone", str(tmp_path / "gone"), "finished", {}, {})
    with pytest.raises(RunNotFoundError, match="no run gone"):
        raytorch.find_run(gone)
    with pytest.raises(UserError, match="a format is one of onnx, torchscript, pt2, safetensors, hf, not 'onxx'"):
        gone.export("onxx", tmp_path / "x")  # type: ignore[arg-type]
