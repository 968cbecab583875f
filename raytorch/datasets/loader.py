"""Batches of a data set: which samples each rank gets in each optimizer step, and how they are augmented.

All of it follows from the seed, the epoch and the position in the epoch, so that a run resumes at the exact next batch,
also under another number of workers.
"""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from raytorch.config import Augment
from raytorch.config.run import steps_per_epoch
from raytorch.datasets.augmentation import Draws
from raytorch.datasets.order import BlockOrder, DrawnOrder, Order, ShuffledOrder
from raytorch.datasets.requests import Request, Split, moved
from raytorch.errors import CheckpointError, ConfigError

Span = tuple[int, int]
"""Where a global batch begins and ends in the order of an epoch."""
_MOST_EPOCHS = 1_000_003
"""Of a pass, whose samples draw other random numbers than those of another."""
_AT_ONCE = 65_536
"""Places of an order that are computed at once: it takes no longer for a thousand than for one."""


class MicroBatch(NamedTuple):
    """Samples that one forward and backward pass of one rank reads.

    ``weight`` makes the mean over the global batch of the ranks' averaged gradients: it is the share of the global
    batch's samples that are here, times the number of ranks. Sum ``weight * mean_loss`` over a rank's micro-batches.
    """

    content: Any
    """What the data set gives: of the shipped ones see :meth:`Dataset.batch`."""
    samples: int
    """How many; 0 where a sample only keeps an idle rank in step."""
    weight: float
    """1 / micro-batches where the global batch divides evenly; 0 without samples."""


class TrainLoader:
    """Endless epochs of a shuffled data set, the same for any number of ranks.

    Each has every sample once; with weights, it has as many samples, drawn with replacement.

    Attributes:
        samples: samples of the data set.
        batch_size: samples per optimizer step over all ranks.
        steps_per_epoch: optimizer steps in an epoch; the last has a smaller batch, or one of up to a quarter more.
        epoch: the current epoch, from 0.
        position: samples of the epoch that all ranks have been given, including those of the current step.
    """

    def __init__(
        self,
        dataset: Split,
        *,
        batch_size: int,
        micro_batches: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        augment: Augment = Augment(),  # noqa: B008 (frozen)
        weights: Tensor | None = None,
        blocks: Tensor | None = None,
    ) -> None:
        """``batch_size`` counts samples per optimizer step over all ranks; ``weights``, float64 (N,), say in proportion
        to what samples are drawn; or ``blocks``, int64 (M,), how many of them lie together. Raises ConfigError.

        Ranks need the same arguments but for ``rank``.
        """
        if augment.flip and not getattr(dataset, "mirrors", True):
            raise ConfigError("data.augment.flip: must be false, as these inputs read differently when mirrored")
        self._dataset = dataset
        self.batch_size = batch_size
        self._micro_batches = micro_batches
        self._rank = rank
        self._world_size = world_size
        self._seed = seed
        self._augment = augment
        self.samples = len(dataset)
        self._weights, self._blocks = weights, blocks
        self._is_stream = bool(getattr(dataset, "is_in_order_alone", False))
        if self._is_stream and batch_size < world_size:
            raise ConfigError(
                f"batch_size ({batch_size}): a stream gives each of {world_size} workers as many; take at least as many"
            )
        self._pass = 0
        self.steps_per_epoch = steps_per_epoch(len(dataset), batch_size)
        self.epoch = -1
        self.next_epoch()

    @property
    def readers(self) -> int | None:
        """Processes that read ahead; None for a data set in memory."""
        return getattr(self._dataset, "readers", None)

    def begin_pass(self, number: int) -> None:
        """Begin anew with other orders than those of earlier passes of so many over data of the same seed."""
        self._pass, self.epoch = number, -1
        self.next_epoch()

    def next_epoch(self) -> None:
        """Go to the start of the next epoch, with a new order."""
        self.epoch += 1
        self.position = 0
        self._order = self._new_order()

    def remaining(self) -> Iterator[list[MicroBatch]]:
        """The rest of the epoch: the rank's micro-batches of one optimizer step after the other.

        A :meth:`state_dict` taken while a step is worked on resumes at the step after it.
        """
        begin = self.position - (self.position % self._world_size if self._is_stream else 0)
        contents = self._dataset.read(self._requests(begin))
        for start, stop in self._spans(begin):
            self.position = stop
            sizes = [high - low for low, high in self._own_bounds(start, stop)]
            share = self._world_size / (stop - start)
            yield [MicroBatch(next(contents), size, size * share) for size in sizes]

    def state_dict(self) -> dict[str, int]:
        """The place in the data, from which the order of the samples follows; the same on all ranks."""
        return {"samples": self.samples, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken. Raises CheckpointError if that was on another number of samples."""
        samples, epoch, position = (state[name] for name in ("samples", "epoch", "position"))
        if any(type(number) is not int for number in (samples, epoch, position)):
            raise CheckpointError(f"the checkpoint's place in the data, epoch {epoch!r:.99}, is damaged")
        if samples != self.samples:
            raise CheckpointError(
                f"the checkpoint orders {samples:,} training samples, the data set has {self.samples:,}; resume with "
                "the data of the run that saved it"
            )
        if epoch < 0 or not 0 <= position <= samples:
            raise CheckpointError(f"the checkpoint's place in the data, epoch {epoch:,}, is damaged")
        self.epoch, self.position = epoch, position
        self._order = self._new_order()

    def _new_order(self) -> Order:
        """That of the samples of this epoch."""
        seed = self._seed_sequence()
        if self._weights is not None:
            return DrawnOrder(self._weights, seed)
        return ShuffledOrder(self.samples, seed) if self._blocks is None else BlockOrder(self._blocks, seed)

    def _spans(self, start: int) -> Iterator[Span]:
        """The global batches of the epoch from ``start`` on.

        Of a stream, all ranks have as many samples of each, so that it is sometimes less and sometimes more of them.
        """
        even = self._world_size if self._is_stream else 1
        while start < self.samples:
            steps = -(-start // self.batch_size) if self._is_stream else start // self.batch_size
            until = (steps + 1) * self.batch_size if self._is_stream else start + self.batch_size
            stop = self.samples if steps >= self.steps_per_epoch - 1 else until // even * even
            yield start, stop
            start = stop

    def _own_bounds(self, start: int, stop: int) -> list[Span]:
        """Where this rank's micro-batches begin and end within a global batch: contiguous, and as even as can be."""
        size, parts, first = stop - start, self._micro_batches * self._world_size, self._rank * self._micro_batches
        return [
            (size * part // parts, size * (part + 1) // parts) for part in range(first, first + self._micro_batches)
        ]

    def _requests(self, begin: int) -> Iterator[Request]:
        number = self._pass * _MOST_EPOCHS + self.epoch + 1
        for start, samples in self._look_up(self._spans(begin)):
            size = len(samples)
            draws = self._draw(start, size) if self._augment.crop or self._augment.flip else None
            for low, high in self._own_bounds(start, start + size):
                is_idle = low == high  # without a sample a rank would leave the others waiting in their collectives
                if is_idle:
                    low, high = 0, 1
                yield Request(samples[low:high], start + low, number, draws and draws.part(low, high), is_idle=is_idle)

    def _look_up(self, spans: Iterable[Span]) -> Iterator[tuple[int, Tensor]]:
        """Where each of the global batches begins, and its samples on the data set's device."""
        known, first = torch.empty(0), 0
        for start, stop in spans:
            if stop > first + len(known):
                until = min(max(stop, start + _AT_ONCE), self.samples)
                known, first = moved(self._order.at(start, until), self._dataset.device), start
            yield start, known[start - first : stop - first]

    def _draw(self, start: int, size: int) -> Draws:
        """Offset and mirroring of each sample of a global batch, drawn as a whole: the same for any world size."""
        generator = self._generator(start)
        offset = torch.randint(2 * self._augment.crop + 1, (size, 2), generator=generator, device="cpu")
        mirrored = torch.randint(2, (size,), generator=generator, dtype=torch.uint8, device="cpu")
        return Draws(self._augment, *moved((offset, mirrored), self._dataset.device))

    def _generator(self, *position: int) -> torch.Generator:
        state = self._seed_sequence(*position).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0]))

    def _seed_sequence(self, *position: int) -> np.random.SeedSequence:
        """That of the epoch, or of a place in it."""
        of_pass = (2**32 - 1, self._pass) if self._pass else ()
        return np.random.SeedSequence(self._seed, spawn_key=(self.epoch, *position, *of_pass))


def evaluation_batches(
    dataset: Split, *, batch_size: int, rank: int = 0, world_size: int = 1, in_step: bool = False
) -> Iterator[MicroBatch]:
    """A rank's share, at most ``batch_size`` samples at a time, each of weight 1.

    The shares of all ranks cover the data set, each sample once. Ranks may get different numbers of batches, or none:
    sum over the ranks after the last batch and call no collective operation before. With ``in_step`` each gets as many,
    which may be a sample larger, and where there are fewer samples than ranks one of 0 samples, which has one to read.
    """
    begin, end = (len(dataset) * number // world_size for number in (rank, rank + 1))
    bounds = [*range(begin, end, batch_size), end]
    if in_step:
        fewest, most = len(dataset) // world_size, -(-len(dataset) // world_size)
        parts = max(1, min(fewest, -(-most // batch_size)))
        bounds = [begin + (end - begin) * part // parts for part in range(parts + 1)]
    spans = list(pairwise(bounds))
    read = (torch.arange(start, max(stop, start + 1), device=dataset.device) for start, stop in spans)
    requests = (Request(indices, start, epoch=0) for (start, _), indices in zip(spans, read, strict=True))
    for (start, stop), content in zip(spans, dataset.read(requests), strict=True):
        yield MicroBatch(content, stop - start, float(stop > start))
