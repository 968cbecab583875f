"""How code of a user's own is called, and with which arguments."""

from pathlib import Path

import pytest
import torch
from torch import nn

import raytorch
from raytorch.config.file import load_config
from raytorch.errors import ConfigError
from raytorch.models.networks import Architecture
from raytorch.models.objectives import loss_function, metrics_of


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with a model and a loss, each in a file of its own."""
    write(tmp_path / "net.py", "def Net(num_classes: int): ...\n")
    write(tmp_path / "losses.py", "def loss(model, batch): ...\n")
    write(tmp_path / "run.yaml", "epochs: 1\nmodel: net.py:Net\nloss: losses.py:loss\n")
    return tmp_path


class _Brings(nn.Linear):
    """A class whose author calls other things ``losses`` and ``metrics``."""

    metrics = ("precision", "recall")

    def losses(self) -> list[float]:
        return []


def test_attributes_of_ones_own_class_are_no_losses_and_metrics_of_raytorchs() -> None:
    config = raytorch.load({"epochs": 1})
    model, batch = _Brings(4, 2), (torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64))
    assert list(metrics_of(config.judged_by, model)) == ["accuracy"]
    assert loss_function(config.loss, model)(model, batch)[0].isfinite()  # type: ignore[index]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "def made(num_classes, /): ...",
            "model: net.py:made does not take these arguments: takes num_classes by position alone (line 1), ",
        ),
        ("made = iter", "model.name: does not tell what it takes; wrap it in a function that names its arguments"),
    ],
)
def test_what_cannot_be_called_is_told(project: Path, source: str, message: str) -> None:
    write(project / "net.py", source)
    config = load_config(project / "run.yaml", ["model=net.py:made"])
    with pytest.raises(ConfigError) as caught:
        Architecture(config.model, (1, 2, 2), 5, config.code).build()
    assert str(caught.value).startswith(message)


def test_a_loss_that_takes_no_batch_is_told_when_it_is_first_imported(project: Path) -> None:
    write(project / "losses.py", "def other(outputs): ...\nloss = other\n")
    config = load_config(project / "run.yaml")
    with pytest.raises(ConfigError, match=r"^loss: losses.py:loss cannot be called with the model and a batch, and "):
        loss_function(config.loss, nn.Linear(1, 1), config.code)


@pytest.mark.parametrize("value", [".inf", ".nan", "[1, -.inf]", "&again [*again]"])
def test_an_argument_that_a_checkpoint_would_not_keep_is_refused(project: Path, value: str) -> None:
    write(project / "net.py", "def net(num_classes, scale=1): ...\n")
    run = write(project / "a.yaml", f"epochs: 1\nmodel:\n  name: net.py:net\n  scale: {value}\n")
    with pytest.raises(ConfigError, match=r"a.yaml:4: model.scale: must be of texts, finite numbers, lists and map"):
        load_config(run)
