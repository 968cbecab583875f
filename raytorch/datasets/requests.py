"""What a loader asks a data set for: the protocol of a split, of those that ship and of a user's own."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from raytorch.datasets.augmentation import Draws
from raytorch.datasets.shares import EndShare, Share


class Request(NamedTuple):
    """The samples of a batch, and what their random numbers follow from."""

    indices: Tensor
    """Which, int64 (B,), on the data set's device."""
    place: int
    """That of the first among all samples of the epoch, in their order; the others follow it."""
    epoch: int
    """From 1; 0 is evaluation."""
    draws: Draws | None = None
    """Random numbers for the images of those that ship."""
    shares: tuple[Share | EndShare, ...] = ()
    """That which they are of, behind those that it is a share of itself: whatever is read in their place is of it."""
    is_idle: bool = False
    """Whether it only keeps a rank in step with others, by a sample that is another's."""


@runtime_checkable
class Split(Protocol):
    """The samples of one split."""

    @property
    def device(self) -> torch.device:
        """Where it takes indices."""

    @property
    def facts(self) -> dict[str, Any]:
        """What a model is told of the data, by the names of its parameters."""

    def __len__(self) -> int: ...

    def read(self, requests: Iterable[Request]) -> Iterator[Any]:
        """The batches that are asked for, in their order; may take requests ahead."""


def moved(batch: Any, device: torch.device) -> Any:
    """A batch on a device: tensors alone, in dictionaries, tuples and lists.

    They come to a GPU from pinned memory, so that nobody waits for them.
    """
    if isinstance(batch, Tensor):
        is_copied = device.type == "cuda" and batch.device.type == "cpu" and batch.layout is torch.strided
        return (batch.pin_memory() if is_copied else batch).to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved(value, device) for value in batch))
    if isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        return type(batch)(moved(value, device) for value in batch)  # type: ignore[call-arg]
    return batch
