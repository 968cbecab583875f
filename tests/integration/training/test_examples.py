"""Each folder of examples/ trains, ends bitwise equal when it is killed and resumed, and is exported."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from whole_runs import assert_bitwise_equal

import raytorch
from raytorch.runs.checkpoint_manifest import latest_checkpoint
from raytorch.runs.storage import RunFolder, split
from raytorch.training.checkpoints import open_checkpoint

pytestmark = pytest.mark.usefixtures("local_ray")

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
FILES = sorted(EXAMPLES.glob("*/*.yaml"))
SHORT: dict[str, Any] = {
    "epochs": None,
    "steps": 24,
    "precision": "fp32",
    "checkpoint.every_epochs": None,
    "checkpoint.every_steps": 6,
    "checkpoint.keep": 99,
}
SHORTER = {"distillation": {"loop.teacher_epochs": 1}, "char_gpt": {"schedule.warmup_steps": 2}}


KILLING_RANK_1 = """

import os, pathlib, signal, torch.distributed
from torch.optim.optimizer import register_optimizer_step_post_hook

_steps = []


def _kill_once(optimizer, *arguments):
    _steps.append(optimizer)
    mark = pathlib.Path({mark!r})
    if len(_steps) == 13 and torch.distributed.is_initialized() and torch.distributed.get_rank() and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


register_optimizer_step_post_hook(_kill_once)
"""
"""Added to an example's code: once in all attempts, the second worker kills itself after its 13th optimizer step."""


def trained(result: raytorch.Result) -> dict[str, dict[str, torch.Tensor]]:
    """The weights in the newest checkpoint, by the name of the model."""
    folder = RunFolder(*split(result.path))
    with open_checkpoint(folder, str(latest_checkpoint(folder))) as saved:
        return {name: saved.model(torch.device("cpu"), name) for name in saved.models}


def assert_same_models(ours: raytorch.Result, theirs: dict[str, dict[str, torch.Tensor]]) -> None:
    assert trained(ours).keys() == theirs.keys()
    for name, weights in trained(ours).items():
        assert_bitwise_equal(weights, theirs[name])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)
def test_an_example_has_all_that_a_run_has(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Path(shutil.copytree(file.parent, tmp_path / "examples" / file.parent.name))
    (tmp_path / ".git").mkdir()  # the project's root, where resume looks for the code
    monkeypatch.chdir(tmp_path)
    file, storage, short = place / file.name, str(tmp_path / "runs"), SHORT | SHORTER.get(file.stem, {})
    code = file.with_suffix(".py")
    code.write_text(code.read_text("utf-8") + KILLING_RANK_1.format(mark=str(tmp_path / "killed")), "utf-8")
    if (drawing := place / "draw_images.py").exists():
        subprocess.run([sys.executable, str(drawing)], check=True)

    run = raytorch.train(file, set=short, storage=storage, name="killed")
    assert (run.state, run.summary["restarts"]) == ("finished", 1)
    whole = raytorch.train(file, set=short | {"export": ["onnx"]}, storage=storage, name="whole")
    expected = trained(whole)
    assert_same_models(run, expected)
    assert run.metrics == whole.metrics
    assert [export["relative_error"] < 1e-4 for export in whole.summary["exports"]] == [True] * len(expected)

    if file.stem == "regression":  # which neither draws at random nor has batch normalization
        compare_with_one_worker(file, storage, whole)

    for later in sorted(Path(whole.path).glob("checkpoint_*"))[1:]:
        shutil.rmtree(later)
    resumed = raytorch.resume(whole)
    assert_same_models(resumed, expected)
    for name, weights in expected.items():
        assert_bitwise_equal(resumed.model(name).state_dict(), weights)
        resumed.export("safetensors", tmp_path / "model.safetensors", model=name)
        assert_bitwise_equal(load_file(tmp_path / "model.safetensors"), weights)


def compare_with_one_worker(file: Path, storage: str, pair: raytorch.Result) -> None:
    """Another number of workers and of micro-batches changes rounding alone."""
    alone = raytorch.train(file, set=SHORT | {"accumulate": 2}, workers=1, storage=storage, name="alone")
    for name, tensor in trained(alone)["model"].items():
        torch.testing.assert_close(tensor, trained(pair)["model"][name], rtol=1e-3, atol=1e-4)
    assert alone.metrics == pytest.approx(pair.metrics, rel=1e-3)
