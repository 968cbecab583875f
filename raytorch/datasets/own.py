"""Data sets of a user's own, read as those that ship are.

A data set has a length, and samples by ``data[index]`` or whole batches by ``data.batch(indices)``, int64 (B,). Samples
are put together by its ``collate(samples)`` if it has one, else as ``torch.utils.data.default_collate`` does. Its
``facts``, a dictionary, are told to the model. Its training samples may be drawn by its ``labels`` or ``weights``, a
number for each. Where it takes ``rng=``, that is a ``numpy.random.Generator`` of the sample's own.
"""

import inspect
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from raytorch.config import Data, OwnData, RunConfig, StoredData
from raytorch.config.own_calls import own_call
from raytorch.datasets.in_memory import load_dataset
from raytorch.datasets.requests import Request, Split
from raytorch.errors import ConfigError

AHEAD = 2
"""Batches that each reader has ready."""
_BATCH, _SAMPLE = 0, 1
"""What random numbers are for."""


class OwnDataset:
    """One split of a data set of the user's own, whose batches are moved to ``device``."""

    device = torch.device("cpu")
    """Where it takes indices."""

    def __init__(self, data: Any, device: torch.device, *, seed: int = 0, readers: int = 0) -> None:
        """``seed`` is that of random numbers, ``readers`` how many processes read ahead. Raises ConfigError."""
        _require_protocol(data)
        self.facts = _facts_of(data)
        """What it says of itself to the model, as it is read again from JSON."""
        self._data, self._target, self._readers = data, device, readers
        self._batches = _Batches(data, seed)

    def __len__(self) -> int:
        return len(self._data)

    @property
    def labels(self) -> Any:
        """What it says of the classes of its samples, if it does."""
        return getattr(self._data, "labels", None)

    @property
    def weights(self) -> Any:
        """What it says of how often its samples are to be drawn, if it does."""
        return getattr(self._data, "weights", None)

    def read(self, requests: Iterable[Request]) -> Iterator[Any]:
        """The batches that are asked for, read ahead if there are readers for that."""
        if self._readers == 0:
            for request in requests:
                yield _moved(self._batches[request], self._target)
            return
        pinned = self._target.type == "cuda"
        loader: Iterable[Any] = DataLoader(
            self._batches,
            sampler=requests,
            batch_size=None,
            num_workers=self._readers,
            prefetch_factor=AHEAD,
            pin_memory=pinned,
            multiprocessing_context="fork",  # other processes would have to import the user's code from files
            generator=torch.Generator(),  # PyTorch's own is dropout's, which has to be the same after a restart
        )
        for batch in loader:
            yield _moved(batch, self._target)


def load_split(config: RunConfig, split: str, device: torch.device) -> Split:
    """The split of a run's data set: of the user's own one with any name, of a shipped one ``train`` or ``test``.

    Raises DataError for files that are not in order, and ConfigError for own code that is no data set.
    """
    data = config.data
    if not isinstance(data, OwnData):
        return load_dataset(data, cast(Literal["train", "test"], split), device)
    made = own_call("data", data, config.code, positional=1)(split)
    return OwnDataset(made, device, seed=config.seed, readers=data.readers)


def shipped_split(part: str | Mapping[str, Any], split: Literal["train", "test"], device: torch.device) -> Split:
    """The split of a shipped data set, by its name or section. Raises ConfigError, and DataError as load_split does."""
    section = {"name": part} if isinstance(part, str) else dict(part)
    try:
        data = TypeAdapter(Data).validate_python(section)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"][1:]))
        raise ConfigError(
            f"data{where and '.'}{where}: {first['msg']}; of a data set of your own give an instance"
        ) from None
    if isinstance(data, StoredData) and not Path(data.root).expanduser().is_absolute():
        raise ConfigError(f"data.root: {data.root} must be given in full, as a worker may run in any folder")
    return load_dataset(data, split, device)


class _Batches(Dataset[Any]):
    """Batches by requests, as a DataLoader's process reads them."""

    def __init__(self, data: Any, seed: int) -> None:
        self._data, self._seed = data, seed
        self._collate = getattr(data, "collate", default_collate)
        self._whole = getattr(data, "batch", None)
        self._takes_rng = _takes_rng(self._whole or data.__getitem__)

    def __getitem__(self, request: Request) -> Any:
        with _seeded(self._sequence(request, 0, _BATCH)):
            if self._whole:
                return self._whole(request.indices, **self._rng(request, 0))
            indices = request.indices.tolist()
            return self._collate([self._sample(request, number, index) for number, index in enumerate(indices)])

    def _sample(self, request: Request, number: int, index: int) -> Any:
        return self._data.__getitem__(index, **self._rng(request, number)) if self._takes_rng else self._data[index]

    def _rng(self, request: Request, number: int) -> dict[str, np.random.Generator]:
        """The argument ``rng`` for one of the samples, if it is taken."""
        if not self._takes_rng:
            return {}
        return {"rng": np.random.Generator(np.random.PCG64(self._sequence(request, number, _SAMPLE)))}

    def _sequence(self, request: Request, number: int, use: int) -> np.random.SeedSequence:
        """What the random numbers of a sample follow from, whoever reads it: its place in the order of the epoch."""
        return np.random.SeedSequence(self._seed, spawn_key=(request.epoch, request.place + number, use))


@contextmanager
def _seeded(sequence: np.random.SeedSequence) -> Iterator[None]:
    """Seed the generators that a data set may draw from; PyTorch's, which dropout draws from, is as it was after it."""
    seed, state = int(sequence.generate_state(1)[0]), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _takes_rng(function: Any) -> bool:
    try:
        return "rng" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # of a class in C
        return False


def _require_protocol(data: Any) -> None:
    kind = type(data).__name__
    if not hasattr(data, "__len__"):
        raise ConfigError(f"data.name: {kind} has no length (__len__), so that a run could not be resumed at its place")
    if not (hasattr(data, "__getitem__") or hasattr(data, "batch")):
        raise ConfigError(f"data.name: {kind} has neither samples (__getitem__) nor batches (batch)")
    if len(data) == 0:
        raise ConfigError(f"data.name: {kind} is empty")


def _facts_of(data: Any) -> dict[str, Any]:
    facts = getattr(data, "facts", {})
    try:
        told = json.loads(json.dumps(facts, allow_nan=False))
    except (TypeError, ValueError):
        told = None
    if not isinstance(told, dict):
        raise ConfigError(
            f"data.name: the facts of {type(data).__name__} must be a dictionary of what JSON has, not {facts!r:.80}"
        )
    return told


def _moved(batch: Any, device: torch.device) -> Any:
    """A batch on a device: tensors alone, in dictionaries, tuples and lists."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_moved(value, device) for value in batch))
    if isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        return type(batch)(_moved(value, device) for value in batch)  # type: ignore[call-arg]
    return batch
