"""A share of the samples of a split: which sample is in it is computed when it is asked for."""

from typing import Any

import numpy as np
from torch import Tensor

from raytorch.datasets.order import LAST_SHIFT, SCRAMBLING
from raytorch.errors import ConfigError

_BITS = 64
_MOST = 2 ** (_BITS - 1)


class Share:
    """The samples that are held out, or those that are not.

    The samples are cut into as many stretches as are held out, and one is drawn of each. So each kind of sample is held
    out in proportion, also where a file has one after the other, and those that lie together stay together.

    Example:
        >>> held_out = Share(10, 2, np.random.SeedSequence(0), is_held_out=True)
        >>> held_out.at(torch.arange(len(held_out)))
        tensor([0, 6])
    """

    def __init__(self, samples: int, held_out: int, seed: np.random.SeedSequence, *, is_held_out: bool) -> None:
        """``held_out`` of the ``samples`` are: fewer than all, and at least 1. Raises ConfigError for too many."""
        if samples * samples >= _MOST:
            raise ConfigError(f"{samples:,} samples are too many to take a share of; name the files of each split")
        self._samples, self._held_out, self._is_held_out = samples, held_out, is_held_out
        self._key = int(seed.generate_state(1, np.uint64)[0] >> np.uint64(1))

    def __len__(self) -> int:
        return self._held_out if self._is_held_out else self._samples - self._held_out

    def at(self, places: Tensor) -> Tensor:
        """The samples at some places of the share, int64 (B,), which is in their order."""
        if self._is_held_out:
            return self._start(places) + self._drawn(places)
        kept = self._samples - self._held_out
        stretch = ((places + 1) * self._held_out - 1) // kept
        within = places - stretch * kept // self._held_out
        return self._start(stretch) + within + (within >= self._drawn(stretch))

    def below(self, samples: Tensor) -> Tensor:
        """How many of the share come before each of some samples, int64 (B,), of 0 to their number."""
        stretch = (((samples + 1) * self._held_out - 1) // self._samples).clamp(max=self._held_out - 1)
        held_out = stretch + (self._start(stretch) + self._drawn(stretch) < samples)
        return held_out if self._is_held_out else samples - held_out

    def _start(self, stretch: Tensor) -> Tensor:
        return stretch * self._samples // self._held_out

    def _drawn(self, stretch: Tensor) -> Tensor:
        """Which of the samples of a stretch is held out."""
        drawn: Tensor = _scrambled(stretch + self._key) % (self._start(stretch + 1) - self._start(stretch))
        return drawn


class EndShare:
    """The end of the samples, or what is before it: of samples of which neighbours go on from each other.

    Example:
        >>> EndShare(10, 2, is_held_out=True).at(torch.arange(2))
        tensor([8, 9])
    """

    def __init__(self, samples: int, held_out: int, *, is_held_out: bool) -> None:
        """``held_out`` of the ``samples`` are."""
        self._size = held_out if is_held_out else samples - held_out
        self._start = samples - held_out if is_held_out else 0

    def __len__(self) -> int:
        return self._size

    def at(self, places: Tensor) -> Tensor:
        """See :meth:`Share.at`."""
        return places + self._start

    def below(self, samples: Tensor) -> Tensor:
        """See :meth:`Share.below`."""
        return (samples - self._start).clamp(0, self._size)


def _scrambled(numbers: Tensor) -> Tensor:
    """As :func:`raytorch.datasets.order.scrambled`, on any device: int64, which wraps around as uint64 does."""
    for shift, factor in SCRAMBLING:
        numbers = (numbers ^ _shifted(numbers, shift)) * (factor - 2**_BITS)
    scrambled: Tensor = numbers ^ _shifted(numbers, LAST_SHIFT)
    return scrambled


def _shifted(numbers: Tensor, shift: int) -> Any:
    return (numbers >> shift) & (2 ** (_BITS - shift) - 1)
