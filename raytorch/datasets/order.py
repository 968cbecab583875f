"""The order of the samples in an epoch: any part of it is computed when it is asked for, and none of it is kept."""

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from raytorch.sources.blocks import TOGETHER

Numbers = np.ndarray[Any, np.dtype[np.uint64]]

_ROUNDS = 10
"""An even number, after which the halves of a number have the bits that they began with."""
_BITS = 64
SCRAMBLING = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
LAST_SHIFT = 31


class Order(Protocol):
    """Which sample has which place."""

    def at(self, start: int, stop: int) -> Tensor:
        """The samples at the places from ``start`` until ``stop``, int64 (stop - start,)."""


class ShuffledOrder:
    """Every one of so many samples once.

    A Feistel network permutes the numbers that have as many bits as the samples need (Luby and Rackoff, How to
    Construct Pseudorandom Permutations, 1988), and what is beyond the last sample is permuted again until it is none of
    those (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002).

    Example:
        >>> ShuffledOrder(10**9, np.random.SeedSequence(0)).at(7 * 10**8, 7 * 10**8 + 3)
        tensor([685936711,  82313517, 335177163])
    """

    def __init__(self, samples: int, seed: np.random.SeedSequence) -> None:
        self._samples = samples
        bits = max(2, (samples - 1).bit_length())
        self._widths = bits // 2, bits - bits // 2
        self._keys = seed.generate_state(_ROUNDS, np.uint64)

    def at(self, start: int, stop: int) -> Tensor:
        """See :meth:`Order.at`."""
        samples = self._permuted(np.arange(start, stop, dtype=np.uint64))
        while (beyond := np.flatnonzero(samples >= self._samples)).size:
            samples[beyond] = self._permuted(samples[beyond])
        return torch.from_numpy(samples.astype(np.int64))

    def _permuted(self, numbers: Numbers) -> Numbers:
        width, other = self._widths  # of the left and of the right half
        left, right = numbers >> np.uint64(other), numbers & np.uint64((1 << other) - 1)
        for key in self._keys:
            left, right = right, left ^ (scrambled(right + key) >> np.uint64(_BITS - width))
            width, other = other, width
        return (left << np.uint64(other)) | right


class BlockOrder:
    """Every one of the samples once, in blocks of those that lie together.

    The blocks are shuffled, and so are the samples of each :data:`TOGETHER` blocks that follow one another: so many are
    read at a time.

    Example:
        >>> BlockOrder(torch.tensor([2, 3]), np.random.SeedSequence(0)).at(0, 5).sort().values
        tensor([0, 1, 2, 3, 4])
    """

    def __init__(self, blocks: Tensor, seed: np.random.SeedSequence) -> None:
        """``blocks``: int64 (M,), samples of each block, at least 1, in the order of the samples."""
        generator = torch.Generator().manual_seed(int(seed.generate_state(1, np.uint64)[0]))
        order = torch.randperm(len(blocks), generator=generator)
        self._ends = blocks[order].cumsum(0)
        self._offsets = (blocks.cumsum(0) - blocks)[order] - (self._ends - blocks[order])  # from a place to its sample
        self._seed = seed

    def at(self, start: int, stop: int) -> Tensor:
        """See :meth:`Order.at`."""
        parts = []
        while start < stop:
            number = int(torch.searchsorted(self._ends, start, right=True)) // TOGETHER
            first, last = self._bounds(number)
            end = min(stop, last)
            within = ShuffledOrder(last - first, self._seed_of(number)).at(start - first, end - first) + first
            parts.append(within + self._offsets[torch.searchsorted(self._ends, within, right=True)])
            start = end
        return torch.cat(parts)

    def _bounds(self, number: int) -> tuple[int, int]:
        """The places from which and until which the blocks are that are shuffled together."""
        first = number * TOGETHER
        last = min(first + TOGETHER, len(self._ends)) - 1
        return int(self._ends[first - 1]) if first else 0, int(self._ends[last])

    def _seed_of(self, number: int) -> np.random.SeedSequence:
        return np.random.SeedSequence(self._seed.entropy, spawn_key=(*self._seed.spawn_key, number))


class DrawnOrder:
    """As many samples as there are, each drawn in proportion to its weight, with replacement.

    Example:
        >>> DrawnOrder(torch.tensor([0.0, 1.0, 0.0]).double(), np.random.SeedSequence(0)).at(0, 3)
        tensor([1, 1, 1])
    """

    def __init__(self, weights: Tensor, seed: np.random.SeedSequence) -> None:
        """``weights``: float64 (N,), at least 0 and not all of them 0."""
        self._ends = weights.cumsum(0)  # a sample has the numbers from the end of the one before it up to its own
        self._last = int(weights.nonzero()[-1])  # which a number that is rounded up to the very end is one of
        self._keys = seed.generate_state(2, np.uint64)

    def at(self, start: int, stop: int) -> Tensor:
        """See :meth:`Order.at`."""
        drawn = np.arange(start, stop, dtype=np.uint64)
        for key in self._keys:
            drawn = scrambled(drawn + key)
        shares = torch.from_numpy((drawn >> np.uint64(11)).astype(np.float64) * 2.0**-53)
        return torch.searchsorted(self._ends, shares * self._ends[-1], right=True).clamp(max=self._last)


def scrambled(numbers: Numbers) -> Numbers:
    """Each bit of a result depends on all of its number's (the finalizer of SplitMix64: Steele, Lea and Flood, Fast
    Splittable Pseudorandom Number Generators, 2014).
    """
    for shift, factor in SCRAMBLING:
        numbers = numbers ^ (numbers >> np.uint64(shift))
        numbers *= np.uint64(factor)
    return numbers ^ (numbers >> np.uint64(LAST_SHIFT))
