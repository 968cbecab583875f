"""Batches of a data set: which samples each rank gets in each optimizer step, and how they are augmented.

All of it follows from the seed, the epoch and the position in the epoch, so that a run resumes at the exact next batch,
also under another number of workers.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from raytorch.config import Augment
from raytorch.config.run import steps_per_epoch
from raytorch.datasets.augmentation import Draws
from raytorch.datasets.requests import Request, Split
from raytorch.errors import CheckpointError, ConfigError

_MOST_EPOCHS = 1_000_003
"""Of a pass, whose samples draw other random numbers than those of another."""


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
    ) -> None:
        """``batch_size`` counts samples per optimizer step over all ranks; ``weights``, float64 (N,), say in proportion
        to what samples are drawn. Raises ConfigError.

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
        self._weights = weights
        self._pass = 0
        self.steps_per_epoch = steps_per_epoch(len(dataset), batch_size)
        self.epoch = -1
        self.next_epoch()

    def begin_pass(self, number: int) -> None:
        """Begin anew with other orders than those of earlier passes of so many over data of the same seed."""
        self._pass, self.epoch = number, -1
        self.next_epoch()

    def next_epoch(self) -> None:
        """Go to the start of the next epoch, with a new order."""
        self.epoch += 1
        self.position = 0
        self._take_order(self._new_order(self._generator()))

    def remaining(self) -> Iterator[list[MicroBatch]]:
        """The rest of the epoch: the rank's micro-batches of one optimizer step after the other.

        A :meth:`state_dict` taken while a step is worked on resumes at the step after it.
        """
        spans = list(self._spans())
        parts = [[self._bounds(start, stop, part) for part in self._own_parts()] for start, stop in spans]
        contents = self._dataset.read(self._requests(spans, parts))
        for (start, stop), bounds in zip(spans, parts, strict=True):
            self.position = stop
            sizes = [high - low for low, high in bounds]
            share = self._world_size / (stop - start)
            yield [MicroBatch(next(contents), size, size * share) for size in sizes]

    def state_dict(self) -> dict[str, Any]:
        """Epoch, position and the order of the samples, as integers and a tensor; the same on all ranks."""
        return {"epoch": self.epoch, "position": self.position, "permutation": self._own_order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken. Raises CheckpointError if that was on another number of samples."""
        epoch, position, order = state["epoch"], state["position"], state["permutation"]
        if type(epoch) is not int or type(position) is not int or epoch < 0 or not 0 <= position <= len(order):
            raise CheckpointError(f"the checkpoint's place in the data, epoch {epoch!r:.99}, is damaged")
        if order.shape != (len(self._dataset),):
            raise CheckpointError(
                f"the checkpoint orders {len(order):,} training samples, the data set has "
                f"{len(self._dataset):,}; resume with the data of the run that saved it"
            )
        if not self._is_order(order):
            raise CheckpointError("the checkpoint's order of the training samples is damaged, or of another data set")
        self.epoch, self.position = epoch, position
        self._take_order(order)

    def _new_order(self, generator: torch.Generator) -> Tensor:
        """The samples of an epoch, int64 (N,)."""
        count, weights = len(self._dataset), self._weights
        if weights is None:
            return torch.randperm(count, generator=generator, device="cpu")
        ends = weights.cumsum(0)  # a sample has the numbers from the end of the one before it up to its own
        drawn = torch.rand(count, generator=generator, dtype=torch.float64, device="cpu") * ends[-1]
        last = int(weights.nonzero()[-1])  # which a number that is rounded up to the very end is one of
        return torch.searchsorted(ends, drawn, right=True).clamp(max=last)

    def _is_order(self, order: Tensor) -> bool:
        """Tell whether an epoch can have such an order."""
        if order.dtype != torch.int64:
            return False
        if self._weights is None:
            return torch.equal(order.sort().values, torch.arange(len(order), device="cpu"))
        return bool(((order >= 0) & (order < len(order))).all()) and bool((self._weights[order] > 0).all())

    def _take_order(self, order: Tensor) -> None:
        self._own_order = order
        self._order = order.to(self._dataset.device)

    def _spans(self) -> Iterator[tuple[int, int]]:
        """Where each of the remaining global batches begins and ends."""
        start = self.position
        while start < len(self._dataset):
            is_last = start // self.batch_size >= self.steps_per_epoch - 1
            stop = len(self._dataset) if is_last else start + self.batch_size
            yield start, stop
            start = stop

    def _own_parts(self) -> range:
        first = self._rank * self._micro_batches
        return range(first, first + self._micro_batches)

    def _bounds(self, start: int, stop: int, part: int) -> tuple[int, int]:
        """One of the contiguous parts, as even as can be, of the global batch from ``start`` to ``stop``."""
        size, parts = stop - start, self._micro_batches * self._world_size
        return size * part // parts, size * (part + 1) // parts

    def _requests(
        self, spans: Sequence[tuple[int, int]], parts: Sequence[Sequence[tuple[int, int]]]
    ) -> Iterator[Request]:
        for (start, stop), bounds in zip(spans, parts, strict=True):
            draws = self._draw(start, stop - start) if self._augment.crop or self._augment.flip else None
            for low, high in bounds:
                if low == high:  # a rank without a sample would leave the others waiting in their collectives
                    low, high = 0, 1
                index = self._order[start + low : start + high]
                yield Request(
                    index, start + low, self._pass * _MOST_EPOCHS + self.epoch + 1, draws and draws.part(low, high)
                )

    def _draw(self, start: int, size: int) -> Draws:
        """Offset and mirroring of each sample of a global batch, drawn as a whole: the same for any world size."""
        generator = self._generator(start)
        offset = torch.randint(2 * self._augment.crop + 1, (size, 2), generator=generator, device="cpu")
        mirrored = torch.randint(2, (size,), generator=generator, dtype=torch.uint8, device="cpu")
        return Draws(self._augment, offset.to(self._dataset.device), mirrored.to(self._dataset.device))

    def _generator(self, *position: int) -> torch.Generator:
        of_pass = (2**32 - 1, self._pass) if self._pass else ()
        sequence = np.random.SeedSequence(self._seed, spawn_key=(self.epoch, *position, *of_pass))
        return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


def evaluation_batches(dataset: Split, *, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[MicroBatch]:
    """A rank's share, at most ``batch_size`` samples at a time, each of weight 1.

    The shares of all ranks cover the data set, each sample once. Ranks may get different numbers of batches, or none:
    sum over the ranks after the last batch and call no collective operation before.
    """
    end = len(dataset) * (rank + 1) // world_size
    spans = [
        (start, min(start + batch_size, end)) for start in range(len(dataset) * rank // world_size, end, batch_size)
    ]
    requests = (Request(torch.arange(*span, device=dataset.device), span[0], epoch=0) for span in spans)
    for (start, stop), content in zip(spans, dataset.read(requests), strict=True):
        yield MicroBatch(content, stop - start, 1.0)
