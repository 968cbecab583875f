"""A function of a user's own after each evaluation: what it is given, what it writes, that the run does not feel it."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lone_runs import final, train, without_ray
from tensorboardX.proto.event_pb2 import Event
from whole_runs import assert_bitwise_equal

from raytorch.config.file import from_data, load_config
from raytorch.errors import ConfigError
from raytorch.runs.metrics import MetricsLog
from raytorch.runs.storage import RunFolder

SHOW = """
import random
import numpy as np
import torch

def show(model, step, *, epoch, metrics, writer=None, note: str = "nothing"):
    assert not torch.is_grad_enabled()
    assert not any(module.training for module in model.modules())
    images = torch.rand(2, 1, 8, 8)  # of the generators that the run draws from
    random.random(), np.random.rand(), torch.nn.functional.dropout(images)
    with open("told.txt", "a") as file:
        print(note, step, epoch, sorted(metrics), writer is not None, model(images).dtype, file=file)
    if writer:
        writer.add_image("first", images[0], step)
        writer.add_text("note", note, step)
        writer.close()
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with without_ray(tmp_path, monkeypatch):
        yield


def write(path: str, text: str) -> None:
    Path(path).write_text(text, encoding="utf-8")


def events(folder: RunFolder | Path) -> list[tuple[str, int]]:
    """Tags and steps of what is in a run's TensorBoard events."""
    path = folder if isinstance(folder, Path) else Path(folder.path)
    found = []
    for file in sorted((path / "tensorboard").iterdir()):
        content, place = file.read_bytes(), 0
        while place < len(content):
            (size,) = struct.unpack_from("<Q", content, place)
            event = Event.FromString(content[place + 12 : place + 12 + size])
            found += [(value.tag, event.step) for value in event.summary.value]
            place += 12 + size + 4
    return found


def test_the_run_is_as_without_it() -> None:
    write("plots.py", SHOW)
    logging = {"every_steps": 100, "tensorboard": True}
    shown = train("shown", epochs=2, on_evaluation={"name": "plots.py:show", "note": "so"}, logging=logging)
    assert_bitwise_equal(final(shown), final(train("plain", epochs=2)))
    told = Path("told.txt").read_text(encoding="utf-8").splitlines()
    rest = "['accuracy', 'loss'] True torch.float32"
    assert told == [f"so 24 1.0 {rest}", f"so 48 2.0 {rest}"]
    tags = events(shown)
    assert [tag for tag in tags if tag[0] in ("first", "note/text_summary")] == [
        ("first", 24),
        ("note/text_summary", 24),
        ("first", 48),
        ("note/text_summary", 48),
    ]
    assert ("test/accuracy", 48) in tags
    assert [file.name for file in Path("runs/shown").iterdir() if file.is_dir() and file.name == "tensorboard"]


def test_without_tensorboard_there_is_no_writer() -> None:
    write("plots.py", SHOW)
    train("shown", on_evaluation="plots.py:show")
    assert Path("told.txt").read_text(encoding="utf-8").split()[:4] == ["nothing", "24", "1.0", "['accuracy',"]
    assert " False " in Path("told.txt").read_text(encoding="utf-8")


def test_what_it_raises_ends_the_run() -> None:
    write("plots.py", "def show(model):\n    raise RuntimeError('no pictures')\n")
    with pytest.raises(RuntimeError, match="no pictures"):
        train("broken", on_evaluation="plots.py:show")


def refusal(text: str, on_evaluation: str) -> str:
    write("plots.py", text)
    write("run.yaml", f"epochs: 1\nmodel: mlp\non_evaluation: {on_evaluation}\n")
    with pytest.raises(ConfigError) as refused:
        load_config("run.yaml")
    return str(refused.value)


@pytest.mark.parametrize(
    ("on_evaluation", "message"),
    [
        (
            "{name: plots.py:show, noet: a}",
            "on_evaluation.noet: unknown key; allowed: name, note (did you mean 'note'?)",
        ),
        ("{name: plots.py:show, note: 3}", "on_evaluation.note: must be text, not 3; quote it: '3'"),
        ("{name: plots.py:show, step: 3}", "on_evaluation.step: is given by the run; leave it out"),
        ("plots.py:shwo", "on_evaluation.name: plots.py has no shwo at its top level (did you mean 'show'?)"),
        ("show", "on_evaluation: must be FILE.py:NAME of your own, not 'show'"),
    ],
)
def test_its_keys_are_its_parameters(on_evaluation: str, message: str) -> None:
    assert refusal(SHOW, on_evaluation) == f"run.yaml:3: {message}"


def test_it_takes_the_model() -> None:
    told = "run.yaml:3: on_evaluation.name: what follows an evaluation is called with the model, and plots.py:show "
    assert refusal("def show(*, step): ...", "plots.py:show").startswith(told)
    text = "class Base:\n    def __init__(self, model, name): ...\nclass show(Base, metaclass=type): ...\n"
    write("plots.py", text)
    with pytest.raises(
        ConfigError, match=r"^on_evaluation.name: plots.py:show has a parameter 'name', which is a key of"
    ):
        train("new", on_evaluation="plots.py:show")


def test_a_recorded_run_finds_it_again() -> None:
    write("plots.py", SHOW)
    config = from_data({"epochs": 1, "on_evaluation": "plots.py:show"})
    assert config.references == ["plots.py:show"]
    assert config.code
    assert list(config.code.sources) == ["plots.py"]
    again: dict[str, Any] = config.model_dump(mode="json")
    assert from_data(again).on_evaluation == config.on_evaluation


def test_a_writer_writes_at_once_into_the_runs_own_events(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, tensorboard=True)
    writer = log.summary_writer()
    writer.add_histogram("weights", np.arange(5.0), 3)
    writer.close()
    writer.add_scalar("more", 1.0, 4)
    log.write("test", 5, 1.0, {"loss": 0.5})
    log.close()
    assert events(tmp_path) == [("weights", 3), ("more", 4), ("test/loss", 5)]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
