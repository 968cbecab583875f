"""Batches of loaders on several ranks, step by step."""

import itertools
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from saved_states import load_saved_state, save_state
from torch import Tensor

from raytorch.datasets import Dataset, MicroBatch, TrainLoader
from raytorch.datasets.in_memory import Moments


def numbered(count: int, shape: tuple[int, int, int] = (1, 2, 2)) -> Dataset:
    """A data set whose sample k has target k; its pixels are random and not black, and are not normalized."""
    pixels = torch.randint(1, 256, (count, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    channels = shape[0]
    return Dataset(pixels, torch.arange(count), Moments((0.0,) * channels, (1.0,) * channels, brightest=1))


def ranks(dataset: Dataset, world_size: int, **options: Any) -> list[TrainLoader]:
    return [TrainLoader(dataset, rank=rank, world_size=world_size, **options) for rank in range(world_size)]


def epoch(loaders: list[TrainLoader]) -> list[list[MicroBatch]]:
    """What is left of the epoch: for each step the micro-batches of all ranks, in the order of the global batch."""
    steps = zip(*(loader.remaining() for loader in loaders), strict=True)
    return [list(itertools.chain.from_iterable(step)) for step in steps]


def samples(step: list[MicroBatch]) -> list[int]:
    """The samples that count in a step."""
    return [sample for part in step if part.weight for sample in part.content[1].tolist()]


def saved(loader: TrainLoader) -> dict[str, Any]:
    """The loader's state after a way through a checkpoint."""
    with TemporaryDirectory() as folder:
        save_state(loader.state_dict(), Path(folder))
        return load_saved_state(Path(folder))


def inputs(step: list[MicroBatch]) -> Tensor:
    return torch.cat([part.content[0] for part in step if part.weight])


def assert_same_steps(actual: list[list[MicroBatch]], expected: list[list[MicroBatch]]) -> None:
    assert list(map(samples, actual)) == list(map(samples, expected))
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(inputs(a), inputs(b))
