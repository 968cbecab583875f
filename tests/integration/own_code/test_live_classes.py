"""Runs of classes that a notebook or a script defines itself."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import ray
import torch
from notebooks import Kernel, cells_of
from safetensors.torch import load_file

import raytorch
from raytorch.errors import ConfigError, ModelFileError, RaytorchError
from raytorch.serialization import load_model

pytestmark = pytest.mark.usefixtures("local_ray")

ROOT = Path(__file__).resolve().parents[3]
NOTEBOOK = ROOT / "examples/notebook/spirals.ipynb"
SHORT = (
    ("epochs=20", "epochs=3"),
    ('{"epochs": 25}', '{"epochs": 4}'),
    ("count: int = 3000", "count: int = 300"),
    ("workers=2", "workers=1"),
)


def test_the_notebook_trains_its_own_classes_and_goes_on_in_another_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cells = cells_of(NOTEBOOK)
    for long, short in SHORT:
        assert sum(long in cell for cell in cells) == 1
        cells = [cell.replace(long, short) for cell in cells]
    *definitions, training, history, model, export, resuming = cells
    kernel = Kernel(monkeypatch)
    for cell in definitions:
        kernel.run(cell)
    metrics = kernel.run(training)
    result = kernel.names["result"]
    assert set(metrics) == {"right", "loss"}
    assert kernel.run(history)[-1]["right"] == metrics["right"]
    assert float(kernel.run(model)) == pytest.approx(metrics["right"], abs=0.01)
    assert isinstance(kernel.names["model"], kernel.names["Net"])
    assert kernel.run(export)[0].relative < 1e-4
    assert kernel.run(resuming) == 4

    code = Path(result.path) / "code/step-0/interactive.py"
    assert "class Spirals" in code.read_text("utf-8")
    assert "ARMS = 3" in code.read_text("utf-8")
    weights = sorted(Path(result.path).glob("checkpoint_*/model.safetensors"))[-1]

    other = Kernel(monkeypatch)  # in which nothing is defined
    with pytest.raises(ConfigError, match=r"no file interactive\.py .* notebook"):
        raytorch.resume(result.path, set={"epochs": 5})
    with pytest.raises(ModelFileError, match=r"no file interactive\.py"):
        raytorch.find_run(result.path).model()
    with pytest.raises(ModelFileError, match=r"it is of interactive\.py:Net, .* and holds no code"):
        load_model(weights)
    for cell in definitions:
        other.run(cell)
    assert isinstance(raytorch.find_run(result.path).model(), other.names["Net"])
    again = load_model(weights, code=other.names["Net"])
    assert torch.equal(again.state_dict()["layers.2.bias"], load_file(weights)["layers.2.bias"])

    other.run(definitions[-1].replace("nn.SiLU()", "nn.Tanh()"))
    with pytest.raises(ConfigError, match=r"interactive\.py has changed") as caught:
        raytorch.resume(result.path, set={"epochs": 5})
    assert caught.value.__notes__ == ["try: raytorch.resume(..., changed_code=True)"]
    changed = raytorch.resume(result.path, set={"epochs": 5}, changed_code=True)
    assert changed.state == "finished"
    [_, later] = sorted((Path(result.path) / "code").iterdir())
    assert "nn.Tanh()" in (later / "interactive.py").read_text("utf-8")

    Kernel(monkeypatch)
    (tmp_path / "interactive.py").write_text((later / "interactive.py").read_text("utf-8"), "utf-8")
    assert type(raytorch.find_run(result.path).model()).__module__ == "interactive"  # moved into a file, as it was told
    assert raytorch.resume(result.path).metrics == changed.metrics


SCRIPT = """
import sys
import torch
from torch import nn
import raytorch


class Sums:
    facts = {"inputs": 4}

    def __init__(self, split: str, *, count: int = 64) -> None:
        self.inputs = torch.randn(count, 4, generator=torch.Generator().manual_seed(len(split)))

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        if index == 7:
            raise ValueError("7 is broken")
        return self.inputs[index], self.inputs[index].sum()


class Linear(nn.Module):
    def __init__(self, *, inputs: int, width: int = 3) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, width), nn.Linear(width, 1))

    def forward(self, inputs):
        if self.training and FAILING:
            raise KeyError("no such thing")
        return self.layers(inputs).squeeze(1)


def squared(model, batch):
    inputs, sums = batch
    return (model(inputs) - sums) ** 2


FAILING, WORKERS = False, 2


def main() -> None:
    parts = {"data": {"name": Sums, "on_error": "skip"}, "model": {"name": Linear, "width": 5}, "loss": squared}
    result = raytorch.train(epochs=2, batch_size=16, workers=WORKERS, name="sums", **parts)
    assert isinstance(result.model(), Linear)
    summary = raytorch.resume(result, set={"epochs": 3}, workers=1).summary
    print(result.state, result.code.entries, summary["epochs"], result.summary["skipped"], summary["skipped"])


if __name__ == "__main__":
    main()
"""


def run(script: Path, text: str) -> "subprocess.CompletedProcess[str]":
    """Run a script, on the Ray of these tests."""
    script.write_text(text, "utf-8")
    here = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    return subprocess.run([sys.executable, script], cwd=script.parent, capture_output=True, text=True, env=here)


def test_a_script_trains_its_own_classes(tmp_path: Path) -> None:
    ran = run(tmp_path / "sums.py", SCRIPT)
    assert ran.stdout == "finished ('sums.py',) 3.0 2 2\n", ran.stderr
    skipped = [json.loads(line) for line in (tmp_path / "runs/sums/skipped.jsonl").read_text("utf-8").splitlines()]
    error = "ValueError: 7 is broken"  # met by two workers, and again when the run is resumed
    assert skipped == [{"split": split, "index": 7, "error": error} for split in ("train", "test")]
    assert (tmp_path / "runs/sums/code/step-0/sums.py").read_text("utf-8") == SCRIPT


def test_an_exception_in_a_class_of_a_script_is_told_with_its_own_traceback(tmp_path: Path) -> None:
    ran = run(tmp_path / "sums.py", SCRIPT.replace("FAILING, WORKERS = False, 2", "FAILING, WORKERS = True, 1"))
    assert 'raise KeyError("no such thing")' in ran.stderr
    assert "raytorch.errors.TrainingError: rank " in ran.stderr


@pytest.mark.parametrize("call", ["main()", "for _ in range(1):\n    main()"])
def test_a_script_without_a_guard_is_refused_before_anything_starts(tmp_path: Path, call: str) -> None:
    text = SCRIPT.partition("if __name__")[0] + call
    ran = run(tmp_path / "sums.py", text)
    line = len(text.splitlines())
    assert f"sums.py:{line}: each worker imports this file, and would call raytorch.train again" in ran.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("page", "begin"), [("README.md", "import raytorch\nfrom own"), ("docs/python.md", "import torch")]
)
def test_the_examples_of_the_pages(tmp_path: Path, page: str, begin: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    [script] = [block for block in blocks if block.startswith(begin)]
    for block in blocks:
        if name := re.match(r"# (\w+\.py)\n", block):
            (tmp_path / name[1]).write_text(block, "utf-8")
    shorter = re.sub(r"epochs=\d+", "epochs=1", script)
    ran = run(tmp_path / "example.py", shorter)
    assert (ran.returncode, bool(ran.stdout)) == (0, True), ran.stderr


def test_a_file_that_trains_as_it_is_imported_ends_in_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sums.py").write_text(SCRIPT.replace('if __name__ == "__main__":', "if True:"), "utf-8")
    keys = {"data": "sums.py:Sums", "model": "sums.py:Linear", "loss": "sums.py:squared"}
    with pytest.raises(RaytorchError, match=r"calls raytorch\.train as it is imported; put the call below if __name__"):
        raytorch.train(epochs=1, workers=1, **keys)
