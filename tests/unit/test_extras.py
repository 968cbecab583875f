"""What raytorch does where the packages of its extras are not installed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from raytorch.config import MlpModel
from raytorch.models.networks import Architecture
from raytorch.runs.checkpoint_manifest import CHECKPOINT_FORMAT
from raytorch.serialization import load_model, save_model

WITHOUT = (
    "import sys; sys.modules |= dict.fromkeys(['matplotlib', 'onnx', 'onnxruntime', 'onnxscript', 'tokenizers'])\n"
)
ONNX = "onnx is not installed here: pip install 'raytorch[onnx]'"
TEXT = "tokenizers is not installed here: pip install 'raytorch[text]'"
TOKENIZE = "from raytorch.cli.main import main; sys.argv[1:] = ['data', 'tokenize', 'runs', '--out', 'out', {}]; main()"
PLOTS = "matplotlib is not installed here: pip install 'raytorch[plots]'"


def run_without_extras(code: str, folder: Path) -> str:
    """The last line that a program says, which may be that of its traceback."""
    done = subprocess.run([sys.executable, "-c", WITHOUT + code], cwd=folder, capture_output=True, text=True)
    return (done.stdout + done.stderr).splitlines()[-1]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a checkpoint and a line of metrics."""
    folder = tmp_path / "runs" / "mine"
    checkpoint = folder / "checkpoint_00000001"
    checkpoint.mkdir(parents=True)
    (folder / "config.yaml").write_text("epochs: 1\ndata: digits\n", encoding="utf-8")
    line = '{"step": 1, "epoch": 1.0, "split": "test", "time": 1.0, "loss": 1.0, "accuracy": 0.5}\n'
    (folder / "metrics.jsonl").write_text(line, encoding="utf-8")
    architecture = Architecture(MlpModel(), (1, 8, 8), 10)
    save_model(architecture.build(), checkpoint / "model.safetensors", architecture)
    size = (checkpoint / "model.safetensors").stat().st_size
    manifest = {"format": CHECKPOINT_FORMAT, "step": 1, "files": {"model.safetensors": size}}
    (checkpoint / "checkpoint.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def test_a_model_is_exported_to_what_needs_no_extra(run: Path, tmp_path: Path) -> None:
    code = "import raytorch; raytorch.find_run('mine').export('{0}', 'model.{0}'); print('written')"
    assert run_without_extras(code.format("safetensors"), tmp_path) == "written"
    assert isinstance(load_model(tmp_path / "model.safetensors"), nn.Module)
    told = run_without_extras(code.format("onnx"), tmp_path)
    assert told == f"raytorch.errors.MissingPackageError: {ONNX}"
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("from raytorch import onnx", f"raytorch.errors.MissingPackageError: {ONNX}"),
        (
            "from raytorch.training.export import require_packages; require_packages(['onnx'])",
            f"MissingPackageError: {ONNX}",
        ),
        ("from raytorch.training.export import require_packages; print(require_packages(['pt2']))", "None"),
        ("from raytorch.cli.main import main; sys.argv[1:] = ['report', 'mine']; main()", PLOTS),
        (TOKENIZE.format("'--tokenizer', 'runs/mine/config.yaml'"), TEXT),
        (TOKENIZE.format("'--key', 'split'"), "out/train.tokens: 6 tokens of 1 documents, uint16"),
        ("from raytorch.cli.main import main; sys.argv[1:] = ['export', 'mine', '--format', 'onnx']; main()", ONNX),
    ],
)
def test_what_needs_an_extra_names_it(run: Path, tmp_path: Path, code: str, told: str) -> None:
    assert run_without_extras(code, tmp_path).endswith(told)
