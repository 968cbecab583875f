"""Each folder of examples/ trains, ends bitwise equal when it is killed and resumed, and is exported."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from whole_runs import assert_bitwise_equal, weights

import raytorch
from raytorch.runs.storage import RunFolder, split

pytestmark = pytest.mark.usefixtures("local_ray")

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
FILES = sorted(EXAMPLES.glob("*/*.yaml"))
SHORT = {"epochs": 4, "schedule": "constant", "precision": "fp32", "checkpoint.every_steps": 3, "checkpoint.keep": 9}


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


def trained(result: raytorch.Result) -> dict[str, torch.Tensor]:
    return weights(RunFolder(*split(result.path)))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)
def test_an_example_has_all_that_a_run_has(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Path(shutil.copytree(file.parent, tmp_path / "project")) / file.name
    monkeypatch.chdir(file.parent)  # where resume looks for the code
    storage = str(tmp_path / "runs")
    [code] = file.parent.glob("*.py")
    code.write_text(code.read_text("utf-8") + KILLING_RANK_1.format(mark=str(tmp_path / "killed")), "utf-8")

    run = raytorch.train(file, overrides=SHORT, storage=storage, name="killed")
    assert (run.state, run.summary["restarts"]) == ("finished", 1)
    whole = raytorch.train(file, overrides=SHORT | {"export": ["onnx"]}, storage=storage, name="whole")
    assert_bitwise_equal(trained(run), trained(whole))
    assert run.metrics == whole.metrics
    assert whole.summary["exports"][0]["relative_error"] < 1e-4

    alone = raytorch.train(file, overrides=SHORT | {"accumulate": 2}, workers=1, storage=storage, name="alone")
    for name, tensor in trained(alone).items():  # another number of workers and of micro-batches changes rounding alone
        torch.testing.assert_close(tensor, trained(whole)[name], rtol=1e-3, atol=1e-4)
    assert alone.metrics == pytest.approx(whole.metrics, rel=1e-3)

    expected = trained(whole)
    for later in sorted(Path(whole.path).glob("checkpoint_*"))[1:]:
        shutil.rmtree(later)
    resumed = raytorch.resume(whole)
    assert_bitwise_equal(trained(resumed), expected)
    resumed.export("safetensors", tmp_path / "model.safetensors")
    assert_bitwise_equal(load_file(tmp_path / "model.safetensors"), resumed.model().state_dict())
