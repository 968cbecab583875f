"""Parts of a run that are a user's own: found, checked by their signatures without being run, and read to be sent."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import raytorch
from raytorch.config import ModelKeys, Ranking, RunConfig
from raytorch.config.file import dump_config, load_config, with_own_code
from raytorch.errors import ConfigError
from raytorch.sweeps.file import load_sweep

NET = """
import pathlib
from torch import nn
from torch.nn import functional as F

pathlib.Path(__file__).with_name("trace").touch()

class Net(nn.Module):
    def __init__(self, input_shape: tuple[int, ...], num_classes: int, *, width: int = 8, act: str = "relu"):
        super().__init__()

def net(num_classes: int, depth: int):
    return nn.Identity()

def Taken(num_classes: int, freeze: bool = True): ...

def smooth(model, batch, *, smoothing: float = 0.1):
    images, labels = batch
    return F.cross_entropy(model(images), labels, label_smoothing=smoothing)

def top(model, batch, *, k: int = 5):
    images, labels = batch
    return (model(images).topk(k).indices == labels[:, None]).sum(), len(labels)

def third(model, batch, thing): ...
"""
RUN = """epochs: 1
model:
  name: net.py:Net
  width: 16
loss: {name: net.py:smooth, smoothing: 0.2}
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project's folder, with code and a run that names it."""
    (tmp_path / ".git").mkdir()
    write(tmp_path / "net.py", NET)
    write(tmp_path / "run.yaml", RUN)
    return tmp_path


KEYS = ", ".join(["name", *ModelKeys.model_fields])


def arguments(model: ModelKeys) -> dict[str, Any]:
    """A model's section without the keys that every model has."""
    return model.model_dump(exclude=set(ModelKeys.model_fields))


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value).replace(f"{path.parent}/", "")


def test_a_part_of_ones_own_has_the_defaults_of_its_signature(project: Path) -> None:
    config = load_config(project / "run.yaml", ["model.act=gelu"])
    assert arguments(config.model) == {"name": "net.py:Net", "width": 16, "act": "gelu"}
    assert config.loss.model_dump() == {"name": "net.py:smooth", "smoothing": 0.2}
    assert config.code is not None
    assert (config.code.root, list(config.code.sources)) == (str(project), ["net.py"])
    assert not (project / "trace").exists()


def test_metrics_of_ones_own_rank(project: Path) -> None:
    text = RUN + "metrics: [{name: net.py:top, k: 3}, accuracy, {name: net.py:smooth, better: lower}]\n"
    config = load_config(write(project / "judged.yaml", text))
    assert [metric.model_dump() for metric in config.metrics] == [
        {"name": "net.py:top", "better": "higher", "k": 3},
        {"name": "accuracy", "better": "higher"},
        {"name": "net.py:smooth", "better": "lower", "smoothing": 0.1},
    ]
    assert config.metric_names == ("top", "accuracy", "smooth")
    assert config.ranking == Ranking("top", higher_is_better=True)
    assert config.ranking_by("smooth") == Ranking("smooth", higher_is_better=False)
    bad = write(project / "bad.yaml", text.replace("k: 3", "j: 3").replace("better: lower", "better: less"))
    assert refusal(bad).splitlines() == [
        "bad.yaml:6: metrics[0].j: unknown key; allowed: name, better, k",
        "bad.yaml:6: metrics[2].better: must be one of higher, lower, not 'less'",
    ]
    alone = write(project / "alone.yaml", RUN + "metrics: [net.py:top]\ncheckpoint: {best_by: topp}\n")
    assert refusal(alone) == (
        "alone.yaml:7: checkpoint.best_by: no metric topp in this run; one of top, loss (did you mean 'top'?)"
    )


@pytest.mark.parametrize(
    ("part", "code", "told"),
    [
        ("data", "class Images:\n    def __init__(self, root='/x', split='train'): ...", "has split in another place"),
        ("data", "def Images(root='/x', *, split='train'): ...", "in another place; let it take split first"),
        (
            "loss",
            "class Images:\n    def __init__(self, gamma=2.0): ...",
            "is a class; write a function, which may call",
        ),
        (
            "loss",
            "def Images(batch, model): ...",
            "model and batch in another place; let it take model and batch first",
        ),
    ],
)
def test_what_is_given_by_position_has_to_have_that_place(project: Path, part: str, code: str, told: str) -> None:
    write(project / "ordered.py", code)
    path = write(project / "ordered.yaml", f"epochs: 1\n{part}: ordered.py:Images\n")
    assert refusal(path).startswith("ordered.yaml:2: ")
    assert told in refusal(path)


def test_a_key_may_be_called_as_what_is_given_by_position(project: Path) -> None:
    write(project / "free.py", "def loss(net, batch, model='a'): ...\ndef data(part, root='/x'): ...\n")
    path = write(project / "free.yaml", "epochs: 1\nloss: {name: free.py:loss, model: b}\ndata: free.py:data\n")
    assert load_config(path).loss.model_dump() == {"name": "free.py:loss", "model": "b"}


def test_a_name_alone(project: Path) -> None:
    config = load_config(write(project / "short.yaml", "epochs: 1\nmodel: net.py:Net\n"))
    assert arguments(config.model) == {"name": "net.py:Net", "width": 8, "act": "relu"}


def test_a_configuration_in_a_folder_of_the_project(project: Path) -> None:
    write(project / "nets/wide.py", "class Wide:\n    def __init__(self, width: int = 3): ...\n")
    beside = load_config(write(project / "nets/a.yaml", "epochs: 1\nmodel: wide.py:Wide\n"))
    assert beside.model.name == "nets/wide.py:Wide"
    assert load_config(write(project / "nets/b.yaml", "epochs: 1\nmodel: net.py:Net\n")).model.name == "net.py:Net"
    again = write(project / "runs/again/config.yaml", dump_config(beside))
    assert load_config(again) == beside


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.widht=3", f"model.widht: unknown key; allowed: {KEYS}, width, act (did you mean 'width'?)"),
        ("model.width=wide", "model.width: must be a whole number, not 'wide'"),
        ("model.width=true", "model.width: must be a whole number, not the boolean true"),
        ("model.num_classes=3", "model.num_classes: is given by the data; leave it out"),
        ("model=net.py:net", "model.depth: missing; must be a whole number"),
        ("loss=net.py:third", "loss.thing: missing, and has no default"),
        ("model=net.py:Nte", "model.name: net.py has no Nte at its top level (did you mean 'Net'?)"),
        (
            "model=net.py:Taken",
            "model.name: has a parameter 'freeze' (line 15), which is a key of raytorch's own; rename it",
        ),
        ("model=nett.py:Net", "model.name: no file nett.py in "),
        ("model=os:system", "model.name: must be FILE.py:NAME, as in nets.py:Net, not 'os:system'"),
        ("model=../net.py:Net", "model.name: ../net.py has a '..'"),
        ("model=/tmp/net.py:Net", "model.name: /tmp/net.py is an absolute path"),
        ("loss.smothing=0.2", "loss.smothing: unknown key; allowed: name, smoothing (did you mean 'smoothing'?)"),
        (
            "loss=focal",
            "loss: must be one of cross_entropy, bce, bce_with_logits, mse or FILE.py:NAME of your own",
        ),
    ],
)
def test_mistakes_are_told_as_those_of_shipped_parts(project: Path, change: str, message: str) -> None:
    told = refusal(project / "run.yaml", change)
    assert told.startswith(f"override {change}: {message}"), told
    assert told.count("\n") == 0
    assert not (project / "trace").exists()


def test_mistakes_are_told_with_their_lines(project: Path) -> None:
    path = write(project / "wrong.yaml", RUN.replace("width: 16", "widht: 16").replace("0.2", "much"))
    assert refusal(path).splitlines() == [
        f"wrong.yaml:4: model.widht: unknown key; allowed: {KEYS}, width, act (did you mean 'width'?)",
        "wrong.yaml:5: loss.smoothing: must be a number, not 'much'",
    ]


def test_code_that_is_not_valid_python(project: Path) -> None:
    write(project / "net.py", NET + "def broken(:\n")
    assert refusal(project / "run.yaml").startswith("run.yaml:3: model.name: net.py:")


def test_a_dictionary_and_the_front_door(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    given: dict[str, Any] = {"epochs": 1, "model": {"name": "net.py:Net", "width": 4}}
    config = raytorch.load(given, {"model.width": 5})
    assert arguments(config.model) == {"name": "net.py:Net", "width": 5, "act": "relu"}
    monkeypatch.chdir("/")
    assert raytorch.load(config, {"model.width": 6}).model.model_dump()["width"] == 6
    assert raytorch.load(config) == config


def test_a_sweep_over_arguments_and_parts_of_ones_own(project: Path) -> None:
    write(project / "nets/other.py", "def other(num_classes: int, *, width: int = 2): ...\n")
    write(project / "nets/run.yaml", "epochs: 1\nmodel: {name: net.py:Net, width: 3}\n")
    text = "run: nets/run.yaml\nparameters:\n  model.name: {grid: [net.py:Net, other.py:other]}\n"
    text += "  model.width: {choice: [4]}\n"
    sweep = load_sweep(write(project / "sweep.yaml", text))
    assert [trial.config.model.name for trial in sweep.trials] == ["net.py:Net", "nets/other.py:other"]
    assert [sorted(trial.config.code.sources) for trial in sweep.trials if trial.config.code] == [
        ["net.py"],
        ["nets/other.py"],
    ]
    bad = write(project / "bad.yaml", text.replace("model.width: {choice: [4]}", "model.widht: {choice: [4]}"))
    with pytest.raises(ConfigError, match=rf"bad.yaml:4: model.widht: unknown key; allowed: {KEYS}, width, act"):
        load_sweep(bad)
    assert not (project / "trace").exists()


def test_commands_run_no_code(project: Path) -> None:
    for command in (["validate", "run.yaml"], ["train", "run.yaml", "--set", "model.widht=3"]):
        subprocess.run([sys.executable, "-m", "raytorch", *command], cwd=project, check=False, timeout=60)
    assert not (project / "trace").exists()


def test_a_metric_may_be_named_as_its_file_is(project: Path) -> None:
    """In a folder of the project a configuration names it from there, and is recorded as of the project's root."""
    write(project / "nets/judge.py", "def top(model, batch): ...\n")
    text = "epochs: 1\nmetrics: [accuracy, judge.py:top]\ncheckpoint: {best_by: judge.py:top}\n"
    text += "stop: {metric: ./judge.py:top, patience: 1}\n"
    run = write(project / "nets/run.yaml", text)
    config = load_config(run)
    assert config.ranking == Ranking("top", higher_is_better=True)
    assert load_config(write(project / "again.yaml", dump_config(config))) == config
    sweep = write(project / "sweep.yaml", "run: nets/run.yaml\nmetric: judge.py:top\nparameters: {seed: {grid: [1]}}\n")
    assert load_sweep(sweep).config.ranking.label == "top"
    wrong = "override checkpoint.best_by=other.py:top: checkpoint.best_by: no metric other.py:top in this run; one of "
    assert refusal(run, "checkpoint.best_by=other.py:top").startswith(wrong)


def test_a_sweep_names_its_code_once(project: Path) -> None:
    """From the run's folder; a folder of the same name in that is another."""
    write(project / "nets/net.py", "def net(num_classes: int, *, here: int = 1): ...\n")
    write(project / "nets/nets/net.py", "def net(num_classes: int, *, there: int = 1): ...\n")
    write(project / "nets/run.yaml", "epochs: 1\nmodel: net.py:net\n")
    sweep = load_sweep(write(project / "sweep.yaml", "run: nets/run.yaml\nparameters: {seed: {grid: [1]}}\n"))
    assert arguments(sweep.trials[0].config.model) == {"name": "nets/net.py:net", "here": 1}


def test_what_is_recorded_is_named_from_the_root(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(project / "run.yaml")
    write(project / "sub/net.py", "def Net(num_classes: int): ...\n")
    monkeypatch.chdir(project / "sub")
    assert with_own_code(config.with_code(None)).model == config.model


@pytest.mark.parametrize(
    ("source", "kind", "line"),
    [
        ("def judge(outputs): ...\n", "loss", 1),
        ("def judge(outputs): ...\n", "metric", 1),
        ("def judge(*, model, batch): ...\n", "metric", 1),
    ],
)
def test_what_cannot_take_a_model_and_a_batch_is_refused(project: Path, source: str, kind: str, line: int) -> None:
    write(project / "judge.py", source)
    change = "loss=judge.py:judge" if kind == "loss" else "metrics=[judge.py:judge]"
    assert (
        f"a {kind} is called with the model and a batch, and judge.py:judge (line {line}) does not take 2 arguments"
        in refusal(project / "run.yaml", change)
    )
    write(project / "judge.py", "def judge(*given): ...\n")
    assert load_config(project / "run.yaml", [change]).references


def test_a_shipped_run_has_no_code() -> None:
    assert RunConfig(epochs=1).code is None
