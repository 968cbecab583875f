"""Seeds and the state of random-number generators."""

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lone_runs import final, train, without_ray
from whole_runs import assert_bitwise_equal

from raytorch.distributed import Worker
from raytorch.training.reproducibility import (
    choose_algorithms,
    generator_states,
    restore_generators,
    seed_everything,
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def unchanged_generators(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave the process's generators and settings as they were."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    choose_algorithms(False, fixed_shapes=False)


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_a_seed_repeats_all_generators() -> None:
    seed_everything(3)
    first = draws()
    seed_everything(4)
    other = draws()
    seed_everything(3)
    assert draws() == first
    assert all(a != b for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(("fixed_shapes", "benchmark"), [(True, True), (False, False)])
def test_the_fastest_algorithms_are_sought_where_shapes_are_fixed(fixed_shapes: bool, benchmark: bool) -> None:
    choose_algorithms(True, fixed_shapes=False)
    choose_algorithms(False, fixed_shapes=fixed_shapes)
    assert torch.backends.cudnn.benchmark == benchmark
    assert not torch.backends.cudnn.deterministic
    assert not torch.are_deterministic_algorithms_enabled()


def test_deterministic_algorithms_are_taken_in_time_and_what_has_none_is_an_error() -> None:
    choose_algorithms(True, fixed_shapes=True)
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert torch.zeros(3).put_(torch.tensor([0]), torch.ones(1), accumulate=True)[0] == 1
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
    assert not torch.utils.deterministic.fill_uninitialized_memory


def test_a_setting_of_cublas_that_is_there_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    choose_algorithms(True, fixed_shapes=False)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_run_on_a_cpu_repeats_to_the_bit(
    deterministic: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with without_ray(tmp_path, monkeypatch):
        keys: dict[str, Any] = {"epochs": None, "steps": 8, "deterministic": deterministic}
        first, second = (final(train(name, {"name": "convnet", "channels": [4]}, **keys)) for name in ("one", "two"))
    assert_bitwise_equal(first, second)


def test_the_largest_seed_of_a_configuration_is_taken() -> None:
    seed_everything(2**32 - 1)


def test_each_rank_goes_on_with_its_own_row() -> None:
    # torch read past the storage offset of a row and crashed, or restored another rank's state without a word.
    rows, expected = [], []
    for rank in range(3):
        torch.manual_seed(rank)
        torch.rand(rank + 1)
        rows.append(generator_states(CPU)["cpu"])
        expected.append(torch.rand(5))
    saved = {"cpu": torch.stack(rows)}
    for rank in (2, 0, 1):
        restore_generators(saved, Worker(rank, 3, CPU), seed=0)
        assert torch.equal(torch.rand(5), expected[rank])


def test_a_group_of_another_size_starts_anew_differently_on_each_rank() -> None:
    saved = {"cpu": generator_states(CPU)["cpu"].unsqueeze(0)}
    drawn = []
    for rank in (0, 1, 0):
        restore_generators(saved, Worker(rank, 2, CPU), seed=5)
        drawn.append(torch.rand(5))
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])


def test_workers_that_compute_together_go_on_with_the_row_of_their_group() -> None:
    saved = {"cpu": torch.stack([torch.Generator().manual_seed(seed).get_state() for seed in range(2)])}
    drawn = []
    for states in (saved, {"cpu": saved["cpu"][:1]}):  # of as many groups, and of others
        for rank in range(4):
            restore_generators(states, Worker(rank, 4, CPU).in_groups_of(2), seed=5)
            drawn.append(torch.rand(5).tolist())
    assert [drawn.index(each) for each in drawn] == [0, 0, 2, 2, 4, 4, 6, 6]


def test_a_checkpoint_of_a_gpu_goes_on_on_a_cpu() -> None:
    state = generator_states(CPU)["cpu"]
    expected = torch.rand(5)
    saved = {"cpu": state.unsqueeze(0), "cuda": torch.zeros(1, 16, dtype=torch.uint8)}
    restore_generators(saved, Worker(0, 1, CPU), seed=0)
    assert torch.equal(torch.rand(5), expected)
