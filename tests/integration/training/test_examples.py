"""Each folder of examples/ trains, ends bitwise equal when it is killed and resumed, and is exported."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from whole_runs import assert_bitwise_equal, weights

import raytorch
from raytorch.runs.status import RunStatus
from raytorch.runs.storage import RunFolder, split

pytestmark = pytest.mark.usefixtures("local_ray")

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
FILES = sorted(EXAMPLES.glob("*/*.yaml"))
SHORT = {"epochs": 4, "schedule": "constant", "precision": "fp32", "checkpoint.every_steps": 3, "checkpoint.keep": 9}


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the runs are kept; the current folder is the project."""
    monkeypatch.chdir(EXAMPLES.parent)
    return str(tmp_path / "runs")


def trained(result: raytorch.Result) -> dict[str, torch.Tensor]:
    return weights(RunFolder(*split(result.path)))


def killing_rank_1(killed: list[int]) -> Callable[[RunStatus], None]:
    """What watches a run and kills a worker once, in its second epoch."""

    def watch(status: RunStatus) -> None:
        if not killed and status.attempts == 1 and (status.progress or {}).get("step", 0) > 8:
            killed.append(status.pids[1])
            os.kill(status.pids[1], signal.SIGKILL)

    return watch


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)
def test_an_example_has_all_that_a_run_has(file: Path, storage: str, tmp_path: Path) -> None:
    killed: list[int] = []
    run = raytorch.train(file, overrides=SHORT, storage=storage, name="killed", watch=killing_rank_1(killed))
    assert (run.state, run.summary["restarts"]) == ("finished", len(killed))
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
