"""Each folder of examples/ trains and is exported; on a Ray, resumed and killed, it ends bitwise equal."""

import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lone_runs import in_place_of_ray
from safetensors.torch import load_file
from whole_runs import assert_bitwise_equal

import raytorch
from raytorch.runs.checkpoint_manifest import latest_checkpoint
from raytorch.runs.storage import RunFolder, split
from raytorch.training.saved_state import open_checkpoint

pytestmark = pytest.mark.usefixtures("local_ray")

KILLED = os.environ.get("RAYTORCH_KILLED_EXAMPLES", "gan")
"""Which train on two workers of a Ray, and are resumed and killed; the suite is content with one that has a loop of its
own. The others train in this process, which shows all that is theirs."""
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
FILES = sorted(EXAMPLES.glob("*/*.yaml"))
SHORT: dict[str, Any] = {
    "epochs": None,
    "steps": 24,
    "precision": "fp32",
    "checkpoint.every_epochs": None,
    "checkpoint.every_steps": 6,
    "checkpoint.keep": 99,
}
SHORTER = {"distillation": {"loop.teacher_epochs": 1}, "char_gpt": {"schedule.warmup_steps": 2, "model.layers": 1}}


KILLING_RANK_1 = """

import os, pathlib, signal, torch.distributed
from torch.optim.optimizer import register_optimizer_step_post_hook

_steps, _order = [], pathlib.Path({order!r})


def _kill_once(optimizer, *arguments):
    _steps.append(optimizer)
    if len(_steps) == 13 and torch.distributed.get_rank() and _order.exists():
        _order.unlink()
        os.kill(os.getpid(), signal.SIGKILL)


if torch.distributed.is_initialized():  # else it is the test itself that loads a model
    register_optimizer_step_post_hook(_kill_once)
"""
"""Added to an example's code: where a file orders it, the second worker kills itself once, after 13 optimizer steps."""


def trained(result: raytorch.Result) -> dict[str, dict[str, torch.Tensor]]:
    """The weights in the newest checkpoint, by the name of the model."""
    folder = RunFolder(*split(result.path))
    with open_checkpoint(folder, str(latest_checkpoint(folder))) as saved:
        return {name: saved.model(torch.device("cpu"), name) for name in saved.models}


@pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")  # of torchvision, which an example uses
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)
def test_an_example_has_all_that_a_run_has(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Path(shutil.copytree(file.parent, tmp_path / "examples" / file.parent.name))
    (tmp_path / ".git").mkdir()  # the project's root, where resume looks for the code
    monkeypatch.chdir(tmp_path)
    file, storage, short = place / file.name, str(tmp_path / "runs"), SHORT | SHORTER.get(file.stem, {})
    if file.stem == "char_gpt":
        short |= {"data.tokens_folder": str(tmp_path / "tokens")}
    code, order = file.with_suffix(".py"), tmp_path / "kill"
    code.write_text(code.read_text("utf-8") + KILLING_RANK_1.format(order=str(order)), "utf-8")
    if (drawing := place / "draw_images.py").exists():
        subprocess.run([sys.executable, str(drawing)], check=True)

    is_killed = file.stem in KILLED.split()
    changes: dict[str, Any] = {"set": short | {"export": ["onnx"]}, "workers": 2 if is_killed else 1}
    with nullcontext() if is_killed else in_place_of_ray(tmp_path, monkeypatch):
        whole = raytorch.train(file, **changes, storage=storage, name="whole")
    expected = trained(whole)
    assert [export["relative_error"] < 1e-4 for export in whole.summary["exports"]] == [True] * len(expected)
    require_models(whole, expected)
    if not is_killed:
        return

    for later in sorted(Path(whole.path).glob("checkpoint_*"))[1:]:
        shutil.rmtree(later)
    order.touch()
    resumed = raytorch.resume(whole)
    assert (resumed.state, resumed.summary["restarts"], order.exists()) == ("finished", 1, False)
    assert trained(resumed).keys() == expected.keys()
    assert resumed.metrics == whole.metrics
    for name, weights in expected.items():
        assert_bitwise_equal(trained(resumed)[name], weights)


def require_models(run: raytorch.Result, expected: dict[str, dict[str, torch.Tensor]]) -> None:
    """Each can be loaded and exported as it was trained."""
    for name, weights in expected.items():
        assert_bitwise_equal(run.model(name).state_dict(), weights)
        run.export("safetensors", "model.safetensors", model=name)
        assert_bitwise_equal(load_file("model.safetensors"), weights)
