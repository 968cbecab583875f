"""How many steps a loop of a user's own takes: told before, and more when it has finished; one worker, no Ray."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lone_runs import Monitor, follow, without_ray

from raytorch.config.file import from_data
from raytorch.runs.checkpoint_manifest import latest_checkpoint
from raytorch.runs.plan import RunPlan
from raytorch.runs.storage import RunFolder
from raytorch.training.saved_state import open_checkpoint

CODE = """
import torch
from torch import nn


class Points:
    def __len__(self):
        return 40

    def batch(self, indices):
        return indices[:, None] / 40.0


def main(run, *, leave_at: int = 0, before: int = 0):
    net = run.model("net", nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.1), nn.Linear(8, 1)))
    optimizer = run.optimizer("adam", torch.optim.Adam(net.parameters(), 0.01))
    for _ in range(before):
        for x in run.batches(Points(), epochs=1):
            step(run, net, optimizer, x)
    for x in run.batches(Points()):
        step(run, net, optimizer, x)
        if run.ends_epoch:
            run.evaluated(error=1.0)
        if run.step == leave_at:
            break
    run.evaluated(error=2.0)


def count(run):
    total = run.steps(range(45)).total
    numbers = torch.cat([batch for batch in run.batches(range(45))])
    run.evaluated(error=float(total != run.step or sorted(numbers.tolist()) != list(range(45))))


def step(run, net, optimizer, x):
    optimizer.zero_grad()
    run.backward((net(x) - x**2).square().mean())
    optimizer.step()
"""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder with a loop in it, the current one; no Ray."""
    (tmp_path / "loops.py").write_text(CODE, encoding="utf-8")
    with without_ray(tmp_path, monkeypatch):
        yield


def train(
    name: str, *, epochs: int, stop: dict[str, Any] | None = None, loop: str = "main", **arguments: int
) -> dict[str, Any]:
    """Follow the loop from the newest checkpoint on, and return what the run came to."""
    config = from_data(
        {
            "name": name,
            "storage": "runs",
            "loop": {"name": f"loops.py:{loop}", **arguments},
            "metrics": [{"name": "error", "better": "lower"}],
            "epochs": epochs,
            "batch_size": 10,
            "stop": stop,
        }
    )
    RunFolder("runs", name).make()
    return follow(RunPlan(config), Monitor())


def weights(name: str) -> dict[str, torch.Tensor]:
    folder = RunFolder("runs", name)
    with open_checkpoint(folder, str(latest_checkpoint(folder))) as saved:
        return saved.model(torch.device("cpu"), "net")


@pytest.mark.parametrize("before", [0, 2])
def test_a_finished_loop_goes_on_in_its_last_batches_when_it_is_given_more_epochs(before: int) -> None:
    train("whole", epochs=3, before=before)
    assert train("parted", epochs=1, before=before)["step"] == 4 * before + 4
    outcome = train("parted", epochs=3, before=before)
    assert (outcome["state"], outcome["step"], outcome["epochs"]) == ("finished", 4 * before + 12, 3)
    torch.testing.assert_close(weights("parted"), weights("whole"), rtol=0, atol=0)


def test_a_loop_that_ended_early_goes_on_when_it_is_no_longer_to() -> None:
    train("whole", epochs=4)
    early = train("parted", epochs=4, stop={"patience": 1})
    assert early["step"] == 8
    assert early["ended_early"]
    assert train("parted", epochs=4, stop={"patience": 1})["step"] == 8
    assert train("parted", epochs=4)["step"] == 16
    torch.testing.assert_close(weights("parted"), weights("whole"), rtol=0, atol=0)


def test_batches_that_a_loop_has_left_itself_stay_left() -> None:
    assert train("left", epochs=2, leave_at=5)["step"] == 5
    assert train("left", epochs=9, leave_at=5)["step"] == 5


def test_a_loop_without_data_counts_and_knows_its_steps_before_it_takes_them() -> None:
    assert train("counted", epochs=1, loop="count")["metrics"] == {"error": 0.0}
