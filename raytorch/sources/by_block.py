"""Which blocks the samples of a batch are in."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]


class InBlock(NamedTuple):
    """The samples of a batch that are in one block."""

    block: int
    places: Array
    """Where they are in the batch, int64 (N,)."""
    within: Array
    """Which they are of the block's samples, int64 (N,)."""


def by_block(ends: Array, samples: Array) -> Iterator[InBlock]:
    """The samples, int64 (B,), by block, in the order in which blocks are first asked for: each is read once, and those
    that come last stay at hand for the batch after this one. ``ends``: how many samples are up to the end of each.

    Example:
        >>> [(each.block, each.places.tolist(), each.within.tolist()) for each in by_block([2, 5], [4, 0, 2])]
        [(1, [0, 2], [2, 0]), (0, [1], [0])]
    """
    ends, samples = np.asarray(ends), np.asarray(samples)
    blocks = np.searchsorted(ends, samples, side="right")
    order = np.argsort(blocks, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(blocks[order])) + 1)
    for places in sorted(parts, key=lambda part: int(part[0])):
        block = int(blocks[places[0]])
        yield InBlock(block, places, samples[places] - (ends[block - 1] if block else 0))
