"""Where the time of training steps goes, held against cases whose answer is known."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raytorch.datasets import MicroBatch
from raytorch.scaling.step_timer import StepTimer, StepTotals

CPU = torch.device("cpu")
PAUSE = 0.2
"""Seconds: much longer than anything else that a step here does."""


def batches(steps: int, samples: int = 4, pause: float = 0) -> Iterator[list[MicroBatch]]:
    for _ in range(steps):
        time.sleep(pause)
        yield [MicroBatch(torch.randn(samples, 8), samples, 1.0)]


def timed(model: nn.Module, steps: Iterator[list[MicroBatch]], pause: float = 0, warmup: int = 0) -> StepTotals:
    """Take the steps, each with a pause in its forward pass."""
    timer = StepTimer(CPU)
    timer.watch(model)
    for parts in timer.steps(steps):
        time.sleep(pause)
        for part in parts:
            timer.backward(model(part.content).sum())
    return timer.totals(warmup)


def test_waiting_for_batches_is_data() -> None:
    totals = timed(nn.Linear(8, 8), batches(3, pause=PAUSE))
    assert (totals.steps, totals.samples) == (3, 12)
    assert totals.seconds > totals.data >= 3 * PAUSE
    assert totals.communication <= totals.seconds - totals.data


def test_a_worker_on_its_own_computes() -> None:
    totals = timed(nn.Linear(8, 8), batches(3), pause=PAUSE)
    assert totals.seconds >= 3 * PAUSE
    assert totals.data + totals.communication <= totals.seconds - 3 * PAUSE


def test_steps_of_the_warm_up_are_left_out() -> None:
    totals = timed(nn.Linear(8, 8), batches(5), warmup=3)
    assert (totals.steps, totals.samples) == (2, 8)
    assert timed(nn.Linear(8, 8), batches(2), warmup=3) == StepTotals(0, 0, 0, 0, 0)


def test_a_step_that_no_other_follows_is_left_out() -> None:
    timer = StepTimer(CPU)
    for taken, _ in enumerate(timer.steps(batches(10)), start=1):
        if taken == 4:
            break
    assert timer.totals().steps == 3


def test_samples_that_only_keep_a_rank_in_step_do_not_count() -> None:
    idle = MicroBatch(torch.randn(1, 8), 0, 0.0)
    totals = timed(nn.Linear(8, 8), iter([[idle], [idle, *next(batches(1))]]))
    assert (totals.steps, totals.samples) == (2, 4)


def test_parameters_that_are_not_trained_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].requires_grad_(False)
    assert timed(model, batches(1)).steps == 1


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class SlowBackward(torch.autograd.Function):
    """The identity, with a pause in its backward pass."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        return inputs.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        time.sleep(2 * PAUSE)
        return gradients[0]


class Net(nn.Module):
    """Two layers that DDP averages one after the other: the second fills a bucket of its own."""

    def __init__(self, slow: bool) -> None:
        super().__init__()
        self.first, self.second, self.slow = nn.Linear(8, 512), nn.Linear(512, 1024), slow

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        return self.second(SlowBackward.apply(hidden) if self.slow else hidden)  # type: ignore[no-untyped-call]


def average_slowly(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """The averaging of the first of two buckets takes PAUSE, beside the backward pass."""
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    threading.Timer(0 if bucket.is_last() else PAUSE, future.set_result, [bucket.buffer()]).start()
    return future


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("slow", [False, True])
def test_averaging_counts_as_communication_where_the_backward_pass_does_not_hide_it(slow: bool) -> None:
    net = DistributedDataParallel(Net(slow))
    net.register_comm_hook(None, average_slowly)
    totals = timed(net, batches(4), warmup=1)  # DDP forms the two buckets after its first step
    if slow:
        assert totals.communication <= totals.seconds - 3 * 2 * PAUSE
    else:
        assert totals.communication > PAUSE  # of the three there are
