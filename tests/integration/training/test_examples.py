"""Each folder of examples/ trains, ends bitwise equal when it is killed and resumed, and is exported."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from whole_runs import assert_bitwise_equal, weights

import raytorch
from raytorch.runs.storage import RunFolder, split

pytestmark = pytest.mark.usefixtures("local_ray")

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
FILES = sorted(EXAMPLES.glob("*/*.yaml"))
SHORT = {"epochs": 4, "schedule": "constant", "checkpoint.every_steps": 3, "checkpoint.keep": 9}


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the runs are kept; the current folder is the project."""
    monkeypatch.chdir(EXAMPLES.parent)
    return str(tmp_path / "runs")


def trained(result: raytorch.Result) -> dict[str, torch.Tensor]:
    return weights(RunFolder(*split(result.path)))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)
def test_a_run_that_is_killed_and_resumed_ends_with_the_same_bits(file: Path, storage: str) -> None:
    whole = raytorch.train(file, overrides=SHORT, storage=storage, name="whole")
    assert whole.state == "finished"

    def kill(status: Any) -> None:
        step = (status.progress or {}).get("step", 0)
        if step > 8 and status.attempts == 1 and not killed:
            killed.append(status.pids[1])
            os.kill(status.pids[1], signal.SIGKILL)

    killed: list[int] = []
    again = raytorch.train(file, overrides=SHORT, storage=storage, name="killed", watch=kill)
    assert (again.state, again.summary["restarts"]) == ("finished", len(killed))
    assert_bitwise_equal(trained(again), trained(whole))
    assert again.metrics == whole.metrics

    first = min(Path(whole.path).glob("checkpoint_*"))
    for later in sorted(Path(whole.path).glob("checkpoint_*"))[1:]:
        shutil.rmtree(later)
    expected = trained(again)
    resumed = raytorch.resume(whole)
    assert first.exists()
    assert_bitwise_equal(trained(resumed), expected)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)
def test_the_number_of_workers_changes_rounding_alone(file: Path, storage: str) -> None:
    short = SHORT | {"precision": "fp32", "accumulate": 2}
    two = raytorch.train(file, overrides=short, storage=storage, name="two")
    one = raytorch.train(file, overrides=short | {"accumulate": 1}, workers=1, storage=storage, name="one")
    for name, tensor in trained(one).items():
        torch.testing.assert_close(trained(two)[name], tensor, rtol=1e-3, atol=1e-4)
    for name, value in one.metrics.items():
        assert two.metrics[name] == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)
def test_its_model_is_loaded_and_exported(file: Path, storage: str, tmp_path: Path) -> None:
    short = SHORT | {"epochs": 1, "export": ["onnx"]}
    run = raytorch.train(file, overrides=short, workers=1, storage=storage, name="exported")
    assert run.summary["exports"][0]["relative_error"] < 1e-4
    [code] = [path for path in Path(run.path, "code/step-0").rglob("*.py") if path.name == f"{file.stem}.py"]
    assert code.read_text(encoding="utf-8") == (file.parent / code.name).read_text(encoding="utf-8")
    state = run.model().state_dict()
    run.export("safetensors", tmp_path / "model.safetensors")
    assert_bitwise_equal(load_file(tmp_path / "model.safetensors"), state)
    assert (
        json.loads(Path(run.path, "summary.json").read_text(encoding="utf-8"))["metrics"].keys() == run.metrics.keys()
    )
