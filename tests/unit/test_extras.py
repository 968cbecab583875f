"""What raytorch does where the packages of its extras are not installed."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from run_folders import WITHOUT_DIGESTS
from torch import nn

from raytorch.config import MlpModel
from raytorch.models.networks import Architecture
from raytorch.serialization import load_model, save_model

WITHOUT = """
import json, os, sys, traceback

sys.modules |= dict.fromkeys(["matplotlib", "onnx", "onnxruntime", "onnxscript", "tokenizers"])
import ray, torch

for line in sys.stdin:
    folder, code, output = json.loads(line)
    if (pid := os.fork()) == 0:
        written = os.open(output, os.O_WRONLY | os.O_CREAT)
        os.dup2(written, 1), os.dup2(written, 2)
        os.chdir(folder)
        try:
            exec(code, {"__name__": "__main__", "sys": sys})
        except SystemExit:
            pass
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(0)
    os.waitpid(pid, 0)
    print("done", flush=True)
"""
"""Runs programs, each in a process that is forked off one which has imported what all of them need."""
ONNX = "onnx is not installed here: pip install 'raytorch[onnx]'"
TEXT = "tokenizers is not installed here: pip install 'raytorch[text]'"
TOKENIZE = "from raytorch.cli.main import main; sys.argv[1:] = ['data', 'tokenize', 'runs', '--out', 'out', {}]; main()"
PLOTS = "matplotlib is not installed here: pip install 'raytorch[plots]'"


Run = Callable[[str], str]
"""Runs a program in the folder of the test; answers with the last line that it says, perhaps of a traceback."""


@pytest.fixture(scope="module")
def process() -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", WITHOUT]
    with subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield process


@pytest.fixture
def run_without_extras(process: "subprocess.Popen[str]", tmp_path: Path) -> Run:
    def run(code: str) -> str:
        assert process.stdin
        assert process.stdout
        output = tmp_path / "output.txt"
        output.unlink(missing_ok=True)
        print(json.dumps([str(tmp_path), code, str(output)]), file=process.stdin, flush=True)
        assert process.stdout.readline() == "done\n"
        return output.read_text(encoding="utf-8").splitlines()[-1]

    return run


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
    manifest = {"format": WITHOUT_DIGESTS, "step": 1, "files": {"model.safetensors": size}}
    (checkpoint / "checkpoint.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


@pytest.mark.usefixtures("run")
def test_a_model_is_exported_to_what_needs_no_extra(run_without_extras: Run, tmp_path: Path) -> None:
    code = "import raytorch; raytorch.find_run('mine').export('{0}', 'model.{0}'); print('written')"
    assert run_without_extras(code.format("safetensors")) == "written"
    assert isinstance(load_model(tmp_path / "model.safetensors"), nn.Module)
    told = run_without_extras(code.format("onnx"))
    assert told == f"raytorch.errors.MissingPackageError: {ONNX}"
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.usefixtures("run")
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
def test_what_needs_an_extra_names_it(run_without_extras: Run, code: str, told: str) -> None:
    assert run_without_extras(code).endswith(told)
