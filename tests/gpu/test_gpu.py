"""Runs on a GPU: NCCL, bf16, and the same numbers as on a CPU."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from whole_runs import assert_bitwise_equal, plan, weights

from raytorch.scaling.timed_training import train_timed
from raytorch.training.driver import run_training

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

ONE_GPU = {"workers": 1, "gpus_per_worker": 1}


@pytest.fixture(scope="module", autouse=True)
def ray_with_a_gpu() -> Iterator[None]:
    from own_ray import own_ray

    with own_ray(num_cpus=2, num_gpus=1):
        yield


def test_a_worker_with_a_gpu_trains_on_it_over_nccl_in_bf16(small_run: dict[str, Any]) -> None:
    summary = run_training(plan(small_run, "gpu", scaling=ONE_GPU, precision="auto", epochs=20))
    assert summary["device"] == torch.cuda.get_device_name(0)
    assert (summary["backend"], summary["precision"]) == ("nccl", "bf16")
    assert summary["metrics"]["accuracy"] > 0.9


def test_the_same_seed_repeats_a_run_on_a_gpu(small_run: dict[str, Any]) -> None:
    first, second = (plan(small_run, name, scaling=ONE_GPU) for name in ("first", "second"))
    run_training(first)
    run_training(second)
    assert_bitwise_equal(weights(first.folder), weights(second.folder))


def test_two_workers_share_a_gpu_over_gloo(small_run: dict[str, Any]) -> None:
    summary = run_training(plan(small_run, "shared", scaling={"workers": 2, "gpus_per_worker": 0.5}))
    assert (summary["backend"], summary["workers"], summary["state"]) == ("gloo", 2, "finished")


def test_steps_are_timed_in_the_gpus_own_time(small_run: dict[str, Any]) -> None:
    work = partial(train_timed, warmup=5, steps=20)
    times = run_training(plan(small_run, "timed", scaling=ONE_GPU), work=work)["step_times"]
    (rank,) = times["ranks"]
    assert (times["steps"], rank["samples"]) == (20, 20 * 64 - 36)  # an epoch ends with a batch of 28
    assert 0 < rank["data"] + rank["communication"] < rank["seconds"]
