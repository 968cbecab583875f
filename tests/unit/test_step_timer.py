"""Where the time of training steps goes, held against cases whose answer is known."""

import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from raytorch.datasets import MicroBatch
from raytorch.step_timer import StepTimer, StepTotals

CPU = torch.device("cpu")
PAUSE = 0.2
"""Seconds: much longer than anything else that a step here does."""


def batches(steps: int, samples: int = 4, pause: float = 0) -> Iterator[list[MicroBatch]]:
    for _ in range(steps):
        time.sleep(pause)
        yield [MicroBatch(torch.randn(samples, 8), torch.zeros(samples), 1.0)]


def timed(model: nn.Module, steps: Iterator[list[MicroBatch]], pause: float = 0, warmup: int = 0) -> StepTotals:
    """Take the steps, each with a pause in its forward pass."""
    timer = StepTimer(model, CPU)
    for parts in timer.steps(steps):
        time.sleep(pause)
        for part in parts:
            timer.backward(model(part.inputs).sum())
    return timer.totals(warmup)


def test_waiting_for_batches_is_data() -> None:
    totals = timed(nn.Linear(8, 8), batches(3, pause=PAUSE))
    assert (totals.steps, totals.samples) == (3, 12)
    assert totals.seconds > totals.data >= 3 * PAUSE
    assert totals.data > 0.5 * totals.seconds
    assert totals.communication < 0.5 * PAUSE


def test_a_worker_on_its_own_computes() -> None:
    totals = timed(nn.Linear(8, 8), batches(3), pause=PAUSE)
    assert totals.seconds >= 3 * PAUSE
    assert totals.data + totals.communication < 0.5 * totals.seconds


def test_steps_of_the_warm_up_are_left_out() -> None:
    totals = timed(nn.Linear(8, 8), batches(5), warmup=3)
    assert (totals.steps, totals.samples) == (2, 8)
    assert timed(nn.Linear(8, 8), batches(2), warmup=3) == StepTotals(0, 0, 0, 0, 0)


def test_a_step_that_no_other_follows_is_left_out() -> None:
    timer = StepTimer(nn.Linear(8, 8), CPU)
    for taken, _ in enumerate(timer.steps(batches(10)), start=1):
        if taken == 4:
            break
    assert timer.totals().steps == 3


def test_samples_that_only_keep_a_rank_in_step_do_not_count() -> None:
    idle = MicroBatch(torch.randn(1, 8), torch.zeros(1), 0.0)
    totals = timed(nn.Linear(8, 8), iter([[idle], [idle, *next(batches(1))]]))
    assert (totals.steps, totals.samples) == (2, 4)


def test_parameters_that_are_not_trained_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].requires_grad_(False)
    assert timed(model, batches(1)).steps == 1


def _rank(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    model = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 8))
    StepTimer(model, CPU)  # what has hooks already can be timed all the same
    net = DistributedDataParallel(model)
    timed(net, batches(2))
    torch.save(timed(net, batches(3), pause=PAUSE if rank == 1 else 0)._asdict(), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_waiting_for_a_slower_worker_is_communication_on_the_faster_one(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(_rank, args=(port, tmp_path), nprocs=2)
    fast, slow = (StepTotals(**torch.load(tmp_path / f"{rank}.pt", weights_only=True)) for rank in range(2))
    assert fast.seconds >= 2 * PAUSE
    assert fast.seconds == pytest.approx(slow.seconds, rel=0.5)
    assert fast.communication > 0.5 * fast.seconds
    assert slow.communication < 0.5 * slow.seconds
