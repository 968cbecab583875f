"""Classes and functions of the running program in a configuration: of files, a notebook, and what is installed."""

import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from notebooks import Kernel

import raytorch
from raytorch.cluster.capacity import Node
from raytorch.config import CodeSnapshot, RunConfig
from raytorch.config.interactive_code import HEADER, assembled, definition, needed, reduced
from raytorch.config.own_calls import imported
from raytorch.errors import ConfigError
from raytorch.service import client
from raytorch.service.dashboard import Nodes

IMPORTS = """
import math
import xml.etree.ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Literal
import numpy as np
import torch
from torch import float32 as single, nn
WIDTH = 16
NAMES = {"b": [1, 2.5, None], "a": ({3, 1}, "x"), "none": (set(), {}, ("alone",), b"", True)}
ROOT = Path("data")
"""
CODE = '''
def area(radius: float) -> float:
    return math.pi * scale * radius

scale = 2

class Above(nn.Module):
    """Uses what is below it."""

    def below(self):
        return Net

@dataclass
class Options:
    width: int = WIDTH

class Net(Above):
    def __init__(self, input_shape: tuple[int, ...], num_classes: int, *, act: Literal["relu", "tanh"] = "relu"):
        super().__init__()
        self.options, self.names, self.root, self.type = Options(), NAMES, ROOT, single
        self.layer = nn.Linear(4, 3)

    def forward(self, images):
        return self.layer(images) * float(np.add(1, area(1.0)))

    def parse(self, text):
        return xml.etree.ElementTree.fromstring(text)

Alias = Net

def squared(model, batch, *, power: float = 2.0):
    unused = [math for math in ()]
    return abs(model(batch[0]) - batch[1]) ** power
'''


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """A notebook in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    kernel = Kernel(monkeypatch)
    kernel.run(IMPORTS)
    kernel.run(CODE)
    return kernel


def code_of(config: RunConfig) -> CodeSnapshot:
    assert config.code
    return config.code


def text_of(config: RunConfig) -> str:
    return code_of(config).sources["interactive.py"]


def named(part: Any) -> tuple[str, dict[str, Any]]:
    return part.name, part.arguments


def refusal(**keys: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        raytorch.load(epochs=1, **keys)
    return str(caught.value)


def test_classes_of_a_notebook_are_those_of_a_file_with_all_that_they_use(kernel: Kernel, tmp_path: Path) -> None:
    net, squared = kernel.names["Net"], kernel.names["squared"]
    config = raytorch.load(epochs=1, model=net, loss={"name": squared, "power": 3})
    assert named(config.model) == ("interactive.py:Net", {"act": "relu"})
    assert config.loss.model_dump() == {"name": "interactive.py:squared", "power": 3.0}
    assert (code_of(config).root, code_of(config).entries) == (str(tmp_path), ("interactive.py",))
    assert imported("interactive.py:Net", config.code) is net  # the class that is there

    names: dict[str, Any] = {"__name__": "elsewhere"}
    exec(text_of(config), names)  # and elsewhere one that computes the same
    made, original = names["Net"]((4,), 3), net((4,), 3)
    made.load_state_dict(original.state_dict())
    images = torch.ones(2, 4)
    with torch.no_grad():
        assert torch.equal(made(images), original(images))
    assert (made.names, made.root, made.type) == (original.names, Path("data"), torch.float32)
    assert made.parse("<a/>").tag == "a"
    assert made.options.width == 16
    assert not {"Alias", "Callable", "torch"} & set(names)


def test_the_text_follows_from_what_is_used_alone(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    net, squared = kernel.names["Net"], kernel.names["squared"]
    both, alone = raytorch.load(epochs=1, loss=squared, model=net), raytorch.load(epochs=1, model=net)
    assert reduced(text_of(both), "Net") == text_of(alone)
    assert code_of(both).needed_by("interactive.py:Net").digests() == code_of(alone).digests()
    assert "squared" not in text_of(alone)

    other = Kernel(monkeypatch)  # the same in another order, among other cells
    other.run("import os\nscale = 2\n" + IMPORTS.replace("WIDTH = 16", "WIDTH = 8 * 2") + "print_all = print")
    other.run(CODE.replace("\nscale = 2\n", ""))
    assert text_of(raytorch.load(epochs=1, model=other.names["Net"], loss=other.names["squared"])) == text_of(both)
    other.run("scale = 3")
    assert text_of(raytorch.load(epochs=1, model=other.names["Net"])) != text_of(alone)


def test_another_name_and_a_partial_function_stand_for_the_same(kernel: Kernel) -> None:
    config = raytorch.load(epochs=1, model=partial(kernel.names["Alias"], act="tanh"))
    assert named(config.model) == ("interactive.py:Net", {"act": "tanh"})
    assert raytorch.load({"epochs": 1, "model": {"name": kernel.names["Net"]}}).model.name == "interactive.py:Net"
    metrics = [partial(kernel.names["squared"], power=1.5), {"name": kernel.names["area"], "better": "lower"}]
    assert "metrics[1]" not in refusal(model=kernel.names["Net"], metrics=[*metrics[:1], "no"])
    assert "does not take 2 arguments" in refusal(model=kernel.names["Net"], metrics=metrics)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("bad = lambda model, batch: 1", "loss: <lambda> is a lambda; define it"),
        (
            "act = lambda x: x\ndef bad(model, batch): return act(1)",
            "act is a lambda, which is not sent; define it with",
        ),
        (
            "class Own:\n    def go(self): ...\ndef go(self): ...\nOwn.go = go\ndef bad(model, batch): return Own",
            "Own.go was given to Own after it was defined, whose text is sent without it; define it in the class",
        ),
        ("def outer():\n    def bad(model, batch): ...\n    return bad\nbad = outer()", "inside another function or"),
        ("big = torch.zeros(3)\ndef bad(model, batch): return big", "bad uses big, a Tensor of the session, which"),
        ("big = [torch.zeros(3)]\ndef bad(model, batch): return big", "a list that is too large or holds more than"),
        ("big = []\nbig.append(big)\ndef bad(model, batch): return big", "a list that is too large or holds more than"),
        ("big = 'x' * 100_001\ndef bad(model, batch): return big", "bad uses big, a str that is too large"),
        ("exec('def bad(model, batch): ...')", "the source of bad is kept nowhere"),
        ("def bad(model, batch, **others): ...", "takes **others"),
        ("bad = nn.functional.mse_loss", "batch): x, y = batch; return mse_loss(model(x), y)"),
        (
            "bad = nn.MSELoss",
            "loss: a loss is a function that is called with the model and a batch, which MSELoss is not",
        ),
        ("bad = nn.MSELoss()", "such as def loss(model, batch): x, y = batch; return MSELoss()(model(x), y)"),
        ("from functools import partial\nbad = partial(squared, 3)", "loss: give the arguments of squared by their"),
    ],
)
def test_what_cannot_be_sent_is_refused_with_what_to_do(kernel: Kernel, cell: str, message: str) -> None:
    kernel.run(cell)
    assert message in refusal(model=kernel.names["Net"], loss=kernel.names["bad"])


def test_an_object_is_refused_as_it_could_not_be_made_again(kernel: Kernel) -> None:
    told = 'model: is an object of Net; give the class, and its arguments: {"name": Net, ...}'
    assert told in refusal(model=kernel.names["Net"]((4,), 3))


def test_what_a_class_takes_from_elsewhere_in_its_text_is_sent(kernel: Kernel) -> None:
    kernel.run("Whole = int\ndef go(self): return Whole(3.5)")
    kernel.run("class Own(Net):\n    forward = go\ndef loss(model, batch): return Own")
    text = text_of(raytorch.load(epochs=1, model=kernel.names["Net"], loss=kernel.names["loss"]))
    assert "from builtins import int as Whole" in text
    assert "class Own(Net):\n    forward = go" in text


def test_arguments_are_checked_as_those_of_a_file(kernel: Kernel) -> None:
    net = kernel.names["Net"]
    assert refusal(model={"name": net, "akt": "relu"}) == (
        "the configuration: model.akt: unknown key; allowed: name, weights, strict, freeze, checkpointing, act "
        "(did you mean 'act'?)"
    )
    assert refusal(model={"name": net, "act": "gelu"}) == (
        "the configuration: model.act: must be one of relu, tanh, not 'gelu' (did you mean 'relu'?)"
    )
    kernel.run("class Wide(nn.Linear):\n    pass")  # whose arguments are in PyTorch's source
    wide = kernel.names["Wide"]
    assert "model.bais: unknown key; allowed: in_features, " in refusal(model={"name": wide, "bais": False})
    assert raytorch.load(epochs=1, model={"name": wide, "bias": False}).model.name == "interactive.py:Wide"


def test_a_recorded_run_says_why_the_session_cannot_go_on_with_it(kernel: Kernel) -> None:
    config = raytorch.load(epochs=1, model=kernel.names["Net"])
    assert raytorch.load(config.with_code(None)).code == config.code
    kernel.run("scale = torch.ones(2)")
    with pytest.raises(ConfigError, match=r"run is of code of your own, .*: area uses scale, a Tensor of the session"):
        raytorch.load(config.with_code(None))


def test_a_class_that_is_defined_anew_is_the_new_one(kernel: Kernel) -> None:
    before = raytorch.load(epochs=1, model=kernel.names["Net"])
    kernel.run(CODE.replace("nn.Linear(4, 3)", "nn.Linear(4, 3, bias=False)"))
    after = raytorch.load(epochs=1, model=kernel.names["Net"])
    assert "bias=False" in text_of(after)
    assert "bias=False" not in text_of(before)
    made = imported("interactive.py:Net", before.code)  # of the code of then, which is no longer there
    assert made is not kernel.names["Net"]
    assert made((4,), 3).layer.bias is not None
    assert raytorch.load(before).code == before.code


def test_what_is_in_files_is_referred_to_there(kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets/filed.py").write_text(
        "from nets.layers import LAYERS\ndef net(num_classes: int, layers: int = LAYERS): ...\n", "utf-8"
    )
    (tmp_path / "nets/layers.py").write_text("LAYERS = 2\n", "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    kernel.run("from nets.filed import net\nimport nets.layers\nfrom nets import layers as own_layers")
    config = raytorch.load(epochs=1, model=kernel.names["net"])
    assert config.model.name == "nets/filed.py:net"
    assert list(code_of(config).sources) == ["nets/filed.py", "nets/layers.py"]

    kernel.run("def used(model, batch): return net(3), own_layers, nets.layers")
    mixed = raytorch.load(epochs=1, model=kernel.names["net"], loss=kernel.names["used"])
    assert list(code_of(mixed).sources) == ["interactive.py", "nets/filed.py", "nets/layers.py"]
    assert "from nets.filed import net\nimport nets\nimport nets.layers\nimport nets.layers as own_layers" in text_of(
        mixed
    )
    for name in [name for name in sys.modules if name.partition(".")[0] == "nets"]:
        del sys.modules[name]


def test_a_loop_of_a_notebook(kernel: Kernel) -> None:
    kernel.run("import raytorch\ndef gan(run: raytorch.Run, *, latent: int = 64) -> None: ...")
    config = raytorch.load(loop={"name": kernel.names["gan"], "latent": 8})
    assert config.loop
    assert config.loop.model_dump() == {"name": "interactive.py:gan", "latent": 8}
    with pytest.raises(ConfigError, match=r"loop.latnt: unknown key; allowed: name, latent"):
        raytorch.load(loop={"name": kernel.names["gan"], "latnt": 8})


def test_other_parts_of_a_notebook(kernel: Kernel) -> None:
    kernel.run("class Top:\n    def __init__(self, *, k: int = 5): ...\nclass Mean(nn.Linear): ...")
    kernel.run("def show(model, step, *, writer=None, count: int = 4): ...")
    net, top, mean, show = (kernel.names[name] for name in ("Net", "Top", "Mean", "show"))
    config = raytorch.load(
        epochs=1,
        model=net,
        metrics=[{"name": top, "k": 3}, partial(mean, bias=True)],
        on_evaluation=partial(show, count=8),
    )
    assert [named(metric) for metric in config.metrics] == [
        ("interactive.py:Top", {"k": 3}),
        ("interactive.py:Mean", {"bias": True}),
    ]
    assert named(config.on_evaluation) == ("interactive.py:show", {"count": 8})
    assert "metrics[0].n: unknown key; allowed: in_features" in refusal(model=net, metrics=[partial(mean, n=1)])
    assert "on_evaluation.n: unknown key; allowed: name, count" in refusal(model=net, on_evaluation=partial(show, n=1))


def test_what_is_installed_is_imported(kernel: Kernel) -> None:
    config = raytorch.load(epochs=1, model={"name": torch.nn.Flatten})
    assert config.model.name == "interactive.py:Flatten"
    assert text_of(config).splitlines()[1:] == ["from torch.nn.modules.flatten import Flatten"]


def test_a_notebook_in_a_folder_of_a_project(kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git").mkdir()
    for folder in ("books", "2 books"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "beside.py").write_text("def block(): ...\n", "utf-8")
        monkeypatch.chdir(tmp_path / folder)
        monkeypatch.syspath_prepend(tmp_path / folder)
        kernel.run("from beside import block\ndef net(num_classes: int): return block()")
        config = raytorch.load(epochs=1, model=kernel.names["net"])
        assert config.model.name == f"{folder}/interactive.py:net"
        assert config.code
        assert [*config.code.sources] == [f"{folder}/beside.py", f"{folder}/interactive.py"]
        sys.modules.pop("beside")


SCRIPT = """
import raytorch
from beside import WIDTH

def net(num_classes: int, width: int = WIDTH): ...

if __name__ == "__main__":
    config = raytorch.load(epochs=1, model=net)
    print(config.model.name, config.code.root, *config.code.sources)
"""


@pytest.mark.parametrize(
    ("ran_in", "git", "expected"),
    [
        ("in/nets", "", "net.py:net ROOT/in/nets beside.py net.py"),
        ("in", "", "nets/net.py:net ROOT/in nets/beside.py nets/net.py"),
        (".", "", "net.py:net ROOT/in/nets beside.py net.py"),  # as no module can be in "in", a word of Python's
        ("/", "in", "nets/net.py:net ROOT/in nets/beside.py nets/net.py"),
        (".", ".", "in/nets/net.py:net ROOT in/nets/beside.py in/nets/net.py"),
    ],
)
def test_a_script_is_of_the_project_that_it_can_be_imported_from(
    tmp_path: Path, ran_in: str, git: str, expected: str
) -> None:
    folder = tmp_path / "in/nets"
    folder.mkdir(parents=True)
    if git:
        (tmp_path / git / ".git").mkdir()
    (folder / "net.py").write_text(SCRIPT, "utf-8")
    (folder / "beside.py").write_text("WIDTH = 3\n", "utf-8")
    command = [sys.executable, str(folder / "net.py")]
    ran = subprocess.run(command, cwd=tmp_path / ran_in, capture_output=True, text=True)
    assert ran.stdout.replace(str(tmp_path), "ROOT").strip() == expected, ran.stderr


class OneNode:
    """A connection to a cluster that has room."""

    url = "http://head:8265"

    def nodes(self) -> Nodes:
        return Nodes([Node("a", {"CPU": 8.0})], False)


def test_a_job_from_a_notebook_has_its_code_as_a_file(
    kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = raytorch.load(epochs=1, model=kernel.names["Net"], storage=tmp_path / "runs")
    archive = tmp_path / "sent/project.zip"
    archive.parent.mkdir()
    monkeypatch.setattr(client, "DashboardConnection", lambda address: OneNode())
    monkeypatch.setattr(raytorch.Client, "_send", lambda self, name, kind, run, command, fill, *more: fill(archive))
    raytorch.Client().submit(config, name="mine")
    with zipfile.ZipFile(archive) as sent:
        assert sent.read("interactive.py").decode() == text_of(config)


def test_a_file_that_somebody_has_written_is_not_taken_apart() -> None:
    mine = "import os\n\nclass Net: ...\n"
    assert reduced(mine, "Net") == mine
    edited = f"{HEADER}import os\n\n\nclass Net:\n    ...\n\n\nprint(Net)\n"
    assert reduced(edited, "Net") == edited


def test_an_order_in_which_all_is_there() -> None:
    texts = {
        "A": "@mark\nclass A:\n    def other(self): return B",
        "B": "class B(A):\n    ...",
        "mark": "def mark(value):\n    return noted(value)",
        "noted": "def noted(value):\n    return value",
        "spare": "spare = 1",
    }
    definitions = {name: definition(text) for name, text in texts.items()}
    names: dict[str, Any] = {}
    exec(assembled(definitions), names)
    assert issubclass(names["B"], names["A"])
    assert needed(definitions, ["A"]) == {"A", "B", "mark", "noted"}
    twisted = {"f": definition("@g\ndef f():\n    ..."), "g": definition("@f\ndef g():\n    ...")}
    with pytest.raises(ValueError, match="f and g need each other before they are there"):
        assembled(twisted)
