"""The splits of a run: what it is trained on, what judges it after each epoch, and what it is tested on at its end."""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, cast

import numpy as np
import torch
from pydantic import BeforeValidator
from torch import Tensor

from raytorch.config import RunConfig, Source, data_root
from raytorch.config.data import ShippedData
from raytorch.config.section import Section, name_alone
from raytorch.config.yaml_tree import DICTIONARY
from raytorch.datasets.own import Adapter, Opener, no_other
from raytorch.datasets.requests import Request, Split
from raytorch.datasets.sampling import blocks_of, drawing_weights, labels_of, number_of_each
from raytorch.datasets.shares import EndShare, Share
from raytorch.datasets.skipping import SkippedSamples
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

    def __init__(self, whole: Split, share: Share | EndShare) -> None:
        """Raises ConfigError for a split whose samples cannot be asked for."""
        if getattr(whole, "is_in_order_alone", False):
            raise ConfigError("validation.share: no share can be taken of a stream; let it have a split for validation")
        self._whole, self._share = whole, share
        self.device, self.facts = whole.device, whole.facts
        self.ordered: bool = getattr(whole, "ordered", False)
        self.mirrors: bool = getattr(whole, "mirrors", True)
        self.readers: int | None = getattr(whole, "readers", None)
        self.describe: Any = getattr(whole, "describe", None)

    def __len__(self) -> int:
        return len(self._share)

    @property
    def labels(self) -> Any:
        """Those of the samples, if the whole split has some."""
        labels = labels_of(self._whole)
        if labels is None or labels.are_known.all():
            return self._of_each("labels") if labels is None else labels.numbers[self._samples()]
        numbers, are_known = (each[self._samples()].numpy() for each in labels)
        return np.ma.MaskedArray(numbers, ~are_known)

    @property
    def weights(self) -> Tensor | None:
        """Those of the samples, if the whole split has some."""
        return self._of_each("weights")

    @property
    def blocks(self) -> Tensor | None:
        """How many of the samples lie together, if the whole split tells."""
        if getattr(self._whole, "blocks", None) is None:
            return None
        sizes = self._share.below(blocks_of(self._whole).cumsum(0)).diff(prepend=torch.zeros(1, dtype=torch.int64))
        return sizes[sizes > 0]

    def _of_each(self, name: str) -> Tensor | None:
        numbers = number_of_each(self._whole, name)
        return None if numbers is None else numbers[self._samples()]

    def _samples(self) -> Tensor:
        return self._share.at(torch.arange(len(self)))

    def read(self, requests: Iterable[Request]) -> Iterator[Any]:
        """The batches that are asked for, as the whole split reads them."""
        return self._whole.read(map(self._of_whole, requests))

    def _of_whole(self, request: Request) -> Request:
        return request._replace(indices=self._share.at(request.indices), shares=(self._share, *request.shares))


def load_splits(
    config: RunConfig, device: torch.device, adapt: Adapter = no_other, skipped: SkippedSamples | None = None
) -> Splits:
    """The splits of a run's data set on ``device``; see :class:`raytorch.datasets.own.Opener` for what is raised.

    ``skipped`` takes the samples that cannot be read.
    """
    load = partial(_opened, Opener(device, config.seed, config.code, adapt, skipped), config.data)
    train, validation = load("train", training=True), config.validation
    test = load("test") if validation is None or validation.test else None
    judged: Split | None = test
    if validation and validation.split:
        judged = load(validation.split)
    elif validation:
        # One that is read from files is opened again: what judges is not changed at random.
        unchanged = load("train") if isinstance(config.data, Source) else train
        held_out = _held_out("validation.share", validation.share or 0, len(train))
        sequence = _sequence(config.seed, "validation")
        judged = Part(unchanged, _share(unchanged, held_out, sequence, is_held_out=True))
        train = Part(train, _share(train, held_out, sequence, is_held_out=False))
    assert judged is not None
    weights = drawing_weights(config.sampling, train)
    most_skipped: int = getattr(config.data, "most_skipped", False)
    if most_skipped and config.sampling == "balanced" and weights is not None:
        _read_each(train, torch.nonzero(weights == 0).flatten())
    return Splits(train, judged, test if validation else None, weights)


def _read_each(split: Split, samples: Tensor) -> None:
    """Read samples that are not drawn, so that those which cannot be read are listed as any that are skipped."""
    requests = (Request(samples[place : place + 1], place, epoch=0) for place in range(len(samples)))
    for _ in split.read(requests):
        pass


def load_split(config: RunConfig, split: str, device: torch.device, *, training: bool = False) -> Split:
    """The split of a run's data set on ``device``, by its name, as :class:`raytorch.datasets.own.Opener` opens it.

    Where the configuration takes a share of the training samples for the test split, it is that, or what is left.
    """
    return _opened(Opener(device, config.seed, config.code), config.data, split, training=training)


def shipped_split(
    part: str | Mapping[str, Any],
    split: Literal["train", "test"],
    device: torch.device,
    seed: int = 0,
    skipped: SkippedSamples | None = None,
) -> Split:
    """The split of a shipped data set, by its name or section, of which ``train`` is trained on.

    Raises ConfigError, and DataError as load_split does.
    """
    if not isinstance(part, str | Mapping):
        raise ConfigError(
            f"run.data takes the name of a shipped data set, or its section, not {type(part).__name__}; a data set of "
            "your own is given to run.batches, run.read and run.share as it is"
        )
    try:
        data = _Shipped(data=cast(Any, part)).data
    except ConfigError as error:
        raise ConfigError(str(error).replace(f"{DICTIONARY}: data", "run.data")) from None
    root = data_root(data) or "/"
    if "://" not in root and not Path(root).expanduser().is_absolute():
        raise ConfigError(f"run.data.root: {root} must be given in full, as a worker may run in any folder")
    return _opened(Opener(device, seed, skipped=skipped), data, split, training=split == "train")


class _Shipped(Section):
    """What is wrong with its keys is told as of a configuration."""

    data: Annotated[ShippedData, BeforeValidator(name_alone)]


def _opened(opener: Opener, data: Any, split: str, *, training: bool = False) -> Split:
    """A split, or of the training samples the share that is the test split, or what it leaves."""
    whole = opener.open(data, split, training=training)
    share = data.test_share if isinstance(data, Source) else None
    if share is None or split == "validation":
        return whole
    held_out = _held_out("data.test", share, len(whole))
    return Part(whole, _share(whole, held_out, _sequence(opener.seed, "test"), is_held_out=split == "test"))


def _share(whole: Split, held_out: int, sequence: np.random.SeedSequence, *, is_held_out: bool) -> Share | EndShare:
    if getattr(whole, "ordered", False):
        return EndShare(len(whole), held_out, is_held_out=is_held_out)
    return Share(len(whole), held_out, sequence, is_held_out=is_held_out)


def _held_out(key: str, share: float, samples: int) -> int:
    """How many samples a share is. Raises ConfigError where it leaves none for it or for the rest."""
    held_out = round(share * samples)
    if not 0 < held_out < samples:
        raise ConfigError(
            f"{key}: {share:g} of {samples:,} training samples is {held_out:,}, and the rest {samples - held_out:,}; "
            "give a share that leaves some for both"
        )
    return held_out


def _sequence(seed: int, split: Literal["validation", "test"]) -> np.random.SeedSequence:
    return np.random.SeedSequence(seed, spawn_key=(_NO_EPOCH, *((1,) if split == "test" else ())))
