"""The splits of a run: what it is trained on, what judges it after each epoch, and what it is tested on at its end."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from raytorch.config import RunConfig, Validation
from raytorch.datasets.own import load_split
from raytorch.datasets.requests import Request, Split
from raytorch.datasets.sampling import drawing_weights, number_of_each
from raytorch.errors import ConfigError

_NO_EPOCH = 2**32 - 1
"""In the place of the epoch that random numbers are drawn for: these are the run's own."""


class Splits(NamedTuple):
    """The samples of a run, by what they are for."""

    train: Split
    judged: Split
    """By which the run is judged after each epoch: the validation split, or without one the test split."""
    test: Split | None
    """What is evaluated once, at the end; None if that has been done after each epoch, or is not to be done."""
    weights: Tensor | None
    """In proportion to what the samples to train on are drawn; None if an epoch has each of them once."""


class Part:
    """Some of the samples of a split, as a split of their own."""

    def __init__(self, whole: Split, indices: Tensor) -> None:
        """``indices``: int64 (N,), which samples, in their order."""
        self._whole, self._indices = whole, indices.to(whole.device)
        self.device, self.facts = whole.device, whole.facts
        self.mirrors: bool = getattr(whole, "mirrors", True)

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def labels(self) -> Tensor | None:
        """Those of the samples, if the whole split has some."""
        return self._of_each("labels")

    @property
    def weights(self) -> Tensor | None:
        """Those of the samples, if the whole split has some."""
        return self._of_each("weights")

    def _of_each(self, name: str) -> Tensor | None:
        numbers = number_of_each(self._whole, name)
        return None if numbers is None else numbers[self._indices.cpu()]

    def read(self, requests: Iterable[Request]) -> Iterator[Any]:
        """The batches that are asked for, as the whole split reads them."""
        indices = self._indices
        return self._whole.read(request._replace(indices=indices[request.indices]) for request in requests)


def load_splits(config: RunConfig, device: torch.device) -> Splits:
    """The splits of a run's data set on ``device``; see :func:`raytorch.datasets.own.load_split` for what is raised."""
    train, validation = load_split(config, "train", device), config.validation
    test = load_split(config, "test", device) if validation is None or validation.test else None
    judged: Split | None = test
    if validation and validation.split:
        judged = load_split(config, validation.split, device)
    elif validation:
        train, judged = _parted(train, validation, config.seed)
    assert judged is not None
    return Splits(train, judged, test if validation else None, drawing_weights(config.sampling, train))


def _parted(whole: Split, validation: Validation, seed: int) -> tuple[Part, Part]:
    """The samples to train on, and those to judge by: the same for any number of workers. Raises ConfigError."""
    samples, held_out = len(whole), validation.held_out(len(whole))
    if not 0 < held_out < samples:
        raise ConfigError(
            f"validation.share: {validation.share:g} of {samples:,} training samples is {held_out:,}, and the rest "
            f"{samples - held_out:,}; give a share that leaves some for both"
        )
    sequence = np.random.SeedSequence(seed, spawn_key=(_NO_EPOCH,))
    generator = torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
    order = torch.randperm(samples, generator=generator)
    return Part(whole, order[held_out:].sort().values), Part(whole, order[:held_out].sort().values)
