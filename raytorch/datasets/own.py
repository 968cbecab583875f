"""Data sets of a user's own, read as those that ship are.

A data set has a length, and samples by ``data[index]`` or whole batches by ``data.batch(indices)``, int64 (B,). Samples
are put together by its ``collate(samples)`` if it has one, else as ``torch.utils.data.default_collate`` does. Its
``facts``, a dictionary, are told to the model. Its training samples may be drawn by its ``labels`` or ``weights``, a
number for each, or shuffled by its ``blocks``, how many of them lie together. Where its neighbours go on from each
other, as it says by ``ordered``, a share that is held out is its end. Where it takes ``rng=``, that is a
``numpy.random.Generator`` of the sample's own. Its ``on_device(batch)``, if it has one, is called with each batch once
that is on the worker's device, and returns what is trained on. Its ``describe(batch)`` says what a person is shown of
that: a dictionary for each sample.
"""

import inspect
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch.utils.data import default_collate

from raytorch.config import CodeSnapshot, OwnData, Source
from raytorch.config.own_calls import own_call
from raytorch.datasets.common_generators import SeededReading, seed_common
from raytorch.datasets.in_memory import load_dataset
from raytorch.datasets.readers import Readers
from raytorch.datasets.requests import Request, Split, moved
from raytorch.datasets.sample_generators import SampleGenerators
from raytorch.datasets.shares import EndShare, Share
from raytorch.datasets.skipping import NoneReadableError, Skipped, SkippedSamples, StandIns, name_samples, name_unlike
from raytorch.errors import ConfigError, DataError
from raytorch.sources import open_source


class OwnDataset:
    """One split of a data set of the user's own, whose batches are moved to ``device``."""

    device = torch.device("cpu")
    """Where it takes indices."""

    def __init__(
        self,
        data: Any,
        device: torch.device,
        *,
        seed: int = 0,
        readers: int = 0,
        name: str = "",
        most_skipped: int = 0,
        skipped: SkippedSamples | None = None,
    ) -> None:
        """``seed`` is that of random numbers, ``readers`` how many processes read ahead, ``name`` that of the split.

        ``skipped`` takes up to ``most_skipped`` samples that cannot be read; with 0 the error of the first is raised.
        Raises ConfigError.
        """
        _require_protocol(data)
        self.facts = _facts_of(data)
        """What it says of itself to the model, as it is read again from JSON."""
        self._data, self._target, self._name = data, device, name or type(data).__name__
        self._most_skipped, self._skipped = most_skipped, skipped or SkippedSamples()
        self._batches = _Batches(data, seed, self._name, most_skipped)
        self.readers = readers
        """Processes that read ahead."""
        self._readers = Readers(self._batches.in_reader, readers, type(data).__name__) if readers else None
        self._on_device = getattr(data, "on_device", None)

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

    @property
    def blocks(self) -> Any:
        """What it says of how many of its samples lie together, if it does."""
        return getattr(self._data, "blocks", None)

    @property
    def ordered(self) -> bool:
        """Whether its neighbours go on from each other, so that a share which is held out is its end."""
        return bool(getattr(self._data, "ordered", False))

    @property
    def describe(self) -> Any:
        """What says of a batch what a person is shown of it, if it has that."""
        return getattr(self._data, "describe", None)

    def read(self, requests: Iterable[Request]) -> Iterator[Any]:
        """The batches that are asked for, read ahead if there are readers for that."""
        batches = self._readers.read(map(_sendable, requests)) if self._readers else self._batches.read(requests)
        if self._most_skipped:
            batches = self._told(batches)
        if self._target.type != "cpu":
            batches = (moved(batch, self._target) for batch in batches)
        return map(self._on_device, batches) if self._on_device else batches

    def _told(self, answers: Iterable["_Answer"]) -> Iterator[Any]:
        """The batches, of which what was skipped is told."""
        for answer in answers:
            if answer.errors:
                self._skipped.add([Skipped(self._name, *each) for each in answer.errors.items()], self._most_skipped)
            if not answer.is_whole:
                *_, last = answer.errors.values()
                raise DataError(f"{self._name}: no sample is left that can be read; the last: {last}")
            yield answer.batch


Adapter = Callable[[Any], Split | None]
"""What reads a data set of another library's; its answer is None for one that follows the protocol."""


def no_other(data: Any) -> None:
    """The adapter of where there is none."""


def is_stream(data: Any) -> bool:
    """Tell whether it is a ``ray.data.Dataset``, which follows no protocol."""
    module = sys.modules.get("ray.data")
    return module is not None and isinstance(data, module.Dataset)


class Opener(NamedTuple):
    """Opens splits of data sets, for the device that their batches are moved to."""

    device: torch.device
    seed: int = 0
    """Of random numbers."""
    code: CodeSnapshot | None = None
    """That of data sets of the user's own."""
    adapt: Adapter = no_other
    skipped: SkippedSamples | None = None
    """Takes the samples that cannot be read."""

    def open(self, data: Any, split: str, *, training: bool) -> Split:
        """The split of a data set by its section: of the user's own one with any name, else ``train`` or ``test``.

        Of one that is read from files it is changed at random, where that is asked for, if it is for ``training``;
        where it has no files for the test split, that is all of the training split. Raises DataError for files that
        are not in order, and ConfigError for own code that is no data set.
        """
        if isinstance(data, Source):
            samples = open_source(data, split, training=training)
        elif isinstance(data, OwnData):
            samples = own_call("data", data, self.code)(split)
            if (adapted := self.adapt(samples)) is not None:
                return adapted
        else:
            return load_dataset(data, cast(Literal["train", "test"], split), self.device)
        return OwnDataset(
            samples,
            self.device,
            seed=self.seed,
            readers=data.readers,
            name=split,
            most_skipped=data.most_skipped,
            skipped=self.skipped,
        )


class _Answer(NamedTuple):
    """A batch, where samples that cannot be read are skipped."""

    batch: Any
    errors: dict[int, str]
    """Of those in whose place others are, by index."""
    is_whole: bool = True
    """False if no others were found."""


class _Batches:
    """Batches by requests; each an :class:`_Answer`, if samples may be skipped."""

    def __init__(self, data: Any, seed: int, name: str = "", most_skipped: int = 0) -> None:
        self._data, self._seed, self._name, self._most_skipped = data, seed, name, most_skipped
        self._collate = getattr(data, "collate", default_collate)
        self._whole: Any = getattr(data, "batch", None)
        self._takes_rng = _takes_rng(self._whole or data.__getitem__)
        self._asked = self._put_together if not self._whole else self._looked_up
        self._batch: Any = self._with_stand_ins if most_skipped else self._asked
        self._stand_ins = StandIns(data, most_skipped, is_random=self._takes_rng)
        self._epoch_seed = lru_cache(self._new_epoch_seed)
        self._generators = SampleGenerators(seed)
        self._seeded = SeededReading()

    def __reduce__(self) -> Any:
        """As it is sent to readers."""
        return _Batches, (self._data, self._seed, self._name, self._most_skipped)

    def read(self, requests: Iterable[Request]) -> Iterator[Any]:
        """Batches that are read in the process that trains."""
        read, seed, batch = self._seeded.read, self._epoch_seed, self._batch  # a look-up takes 40 us, and this counts
        for request in requests:
            yield read(seed(request.epoch) + request.place, batch, request)

    def in_reader(self, sent: "_Sent") -> Any:
        """The same in a process that does nothing else, whose generators are nobody's."""
        request = Request(torch.from_numpy(sent.indices), sent.place, sent.epoch, shares=sent.shares)
        seed_common(self._epoch_seed(request.epoch) + request.place)
        return self._batch(request)

    def _looked_up(self, request: Request) -> Any:
        try:
            return self._of_whole(request)
        except Exception as error:
            name_samples(error, self._name, request.indices.tolist())
            raise

    def _of_whole(self, request: Request) -> Any:
        return self._whole(request.indices, **self._rng(request)) if self._takes_rng else self._whole(request.indices)

    def _put_together(self, request: Request) -> Any:
        data, indices, samples = self._data, request.indices.tolist(), []
        try:
            for number, index in enumerate(indices):
                samples.append(
                    data.__getitem__(index, **self._rng(request, number)) if self._takes_rng else data[index]
                )
        except Exception as error:
            name_samples(error, self._name, [indices[len(samples)]])
            raise
        return self._together(samples, indices)

    def _together(self, samples: list[Any], indices: list[int]) -> Any:
        try:
            return self._collate(samples)
        except Exception as error:
            name_unlike(error, self._name, indices, samples)
            raise

    def _with_stand_ins(self, request: Request) -> _Answer:
        errors: dict[int, str] = {}
        try:
            if not self._whole:
                indices, samples = zip(*self._readable(request, errors), strict=True)
                return _Answer(self._together(list(samples), list(indices)), errors)
            try:
                return _Answer(self._of_whole(request), errors)
            except Exception:
                found = [index for index, _ in self._readable(request, errors)]
            # Where each of them can be read, what is wrong is with the batch, and is raised.
            return _Answer(self._of_whole(request._replace(indices=torch.tensor(found))), errors)
        except NoneReadableError:
            return _Answer(None, errors, is_whole=False)

    def _readable(self, request: Request, errors: dict[int, str]) -> Iterator[tuple[int, Any]]:
        """The samples of a request, or what is read in their place, and which these are."""
        for number, index in enumerate(request.indices.tolist()):
            yield self._stand_ins.read(index, request, partial(self._one, request, number), errors)

    def _one(self, request: Request, number: int, index: int) -> Any:
        rng = self._rng(request, number) if self._takes_rng else {}
        return self._whole(torch.tensor([index]), **rng) if self._whole else self._data.__getitem__(index, **rng)

    def _rng(self, request: Request, number: int = 0) -> dict[str, np.random.Generator]:
        """The argument ``rng`` of a sample: from its place in the order of the epoch, whoever reads it."""
        return {"rng": self._generators.at(request.epoch, request.place + number)}

    def _new_epoch_seed(self, epoch: int) -> int:
        """What is drawn from generators that are not the data set's own follows from this and the batch's place."""
        sequence = np.random.SeedSequence(self._seed, spawn_key=(epoch,))
        return int(sequence.generate_state(1, np.uint64)[0]) >> 1


class _Sent(NamedTuple):
    """A request on its way to a reader."""

    indices: "np.ndarray[Any, Any]"
    place: int
    epoch: int
    shares: tuple[Share | EndShare, ...]


def _sendable(request: Request) -> _Sent:
    return _Sent(request.indices.numpy(), request.place, request.epoch, request.shares)


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
    if callable(facts):
        raise ConfigError(f"data.name: the facts of {type(data).__name__} are a method; put @property above it")
    if not isinstance(told, dict):
        raise ConfigError(
            f"data.name: the facts of {type(data).__name__} must be a dictionary of what JSON has, not {facts!r:.80}"
        )
    return told
