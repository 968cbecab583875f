"""Readers in Ray's workers: started, ended and killed again and again, they leave nothing behind and a run goes on."""

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import ended
import lone_runs
import pytest
import ray
from ended import await_end
from ray import cloudpickle
from whole_runs import assert_bitwise_equal, weights

from raytorch.config.file import from_data
from raytorch.runs.plan import RunPlan, plan_run
from raytorch.training.driver import run_training

STARTS = int(os.environ.get("RAYTORCH_TEST_STARTS", "3"))
"""How often readers are started and ended; the suite is content with few."""
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc"),
    pytest.mark.usefixtures("local_ray"),
]


@pytest.fixture(scope="module", autouse=True)
def sent_to_workers() -> None:
    for module in (ended, sys.modules[__name__]):
        cloudpickle.register_pickle_by_value(module)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])


def start_and_end(number: int) -> list[int]:
    """In a worker: start two readers, read some batches, and end in one of several ways; answers with all processes."""
    import torch

    from raytorch.datasets import TrainLoader
    from raytorch.datasets.own import OwnDataset
    from raytorch.errors import ReaderDiedError
    from raytorch.system.processes import children

    class Rows:
        def __init__(self) -> None:
            self.rows = torch.arange(40_000).view(40, 1000)

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return self.rows[index], os.getpid()

    torch.set_num_threads(2)
    torch.ones(300, 300).matmul(torch.ones(300, 300))  # with threads, as a worker has them
    steps = TrainLoader(OwnDataset(Rows(), torch.device("cpu"), readers=2), batch_size=4).remaining()
    batches = [next(steps)[0].content for _ in range(2)]
    readers = [int(pids[0]) for _, pids in batches]
    keeper = parent_of(readers[0])
    processes = [*readers, keeper, parent_of(keeper)]
    assert all(rows.shape == (4, 1000) and bool((rows.diff(dim=1) == 1).all()) for rows, _ in batches)
    assert len(set(processes)) == 4
    killed = number % 10 if number % 10 <= len(processes) else 0  # now and then a reader, the keeper or the server
    if killed:
        os.kill(processes[-killed], signal.SIGKILL)
        with suppress(ReaderDiedError):
            list(steps)
    del steps
    await_end(*processes[: 4 if killed == 1 else 3])
    assert children() <= {processes[-1]}  # the server stays, for the next ones
    return processes


class Worker:
    def start_and_end(self, count: int) -> list[int]:
        return [pid for number in range(count) for pid in start_and_end(number)]


@pytest.mark.timeout(600 + 10 * STARTS)
def test_readers_start_and_end_in_a_worker_again_and_again() -> None:
    shared = set(os.listdir("/dev/shm"))  # noqa: PTH208
    worker: Any = ray.remote(num_cpus=1)(Worker).remote()
    processes = ray.get(worker.start_and_end.remote(STARTS))
    ray.kill(worker)
    await_end(*processes)
    print(f"{STARTS} starts and ends, {len(set(processes))} processes, none left")
    new = {name for name in os.listdir("/dev/shm") if name.startswith(("torch", "psm", "sem", "raytorch"))}  # noqa: PTH208
    assert new <= shared


# -- a run -------------------------------------------------------------------------------------------------------------

OWN = """
import os
import signal
from pathlib import Path

import torch
from torch import nn


class Rows:
    facts = {"inputs": 6}

    def __init__(self, split: str, *, killed_by: str = "") -> None:
        self.rows = torch.randn(80, 6, generator=torch.Generator().manual_seed(len(split)))
        self.mark = Path(killed_by, split) if killed_by else None

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index, rng):
        if index == 5 and self.mark and self.mark.name == "train" and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.rows[index] + rng.random(), index % 2


class Net(nn.Linear):
    def __init__(self, inputs: int):
        super().__init__(inputs, 2)
"""


def test_a_run_whose_reader_is_killed_goes_on_and_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.py").write_text(OWN, encoding="utf-8")
    (tmp_path / "marks").mkdir()
    monkeypatch.chdir(tmp_path)

    def plan(name: str, **data: Any) -> RunPlan:
        keys = {"epochs": 2, "batch_size": 8, "model": "own.py:Net", "scaling": {"workers": 1}, "seed": 3}
        run = {"data": {"name": "own.py:Rows", **data}, "checkpoint": {"every_steps": 3}}
        return plan_run(from_data({**keys, **run, "failure": {"max_restarts": 1}}), name)

    whole, broken = plan("whole"), plan("broken", readers=2, killed_by=str(tmp_path / "marks"))
    with monkeypatch.context() as patched, lone_runs.without_ray(tmp_path, patched):
        whole.folder.make()
        lone_runs.follow(whole, lone_runs.Monitor())
    summary = run_training(broken)
    assert [mark.name for mark in (tmp_path / "marks").iterdir()] == ["train"]
    assert (summary["restarts"], summary["step"]) == (1, 20)
    assert_bitwise_equal(weights(whole.folder), weights(broken.folder))
