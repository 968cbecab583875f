"""Room for the images of a batch, one behind the other, so that they need not be copied to be put together."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class BatchRoom:
    """Room for one batch after the other, of as many images as the last had. Used by a single thread.

    Example:
        >>> room = BatchRoom(224, 224)
        >>> images = [room.next().fill_(number) for number in range(32)]
        >>> room.batch(images).shape
        torch.Size([32, 224, 224, 3])
    """

    def __init__(self, height: int, width: int) -> None:
        """``height`` and ``width`` are those of all images."""
        self._size, self._last = (height, width), 1
        self._begin(0)

    def __reduce__(self) -> Any:
        return BatchRoom, self._size

    def next(self) -> Tensor:
        """Room for an image, uint8 (H, W, 3), that nobody else is given."""
        if not self._free:
            self._begin(self._last)
        self._given.append(image := self._free.pop())
        return image

    def batch(self, images: Sequence[Tensor]) -> Tensor:
        """Images as a batch, uint8 (B, H, W, 3): their room if it was given for them in this order, else a copy."""
        self._last, end = max(1, len(images)), len(self._given)
        start = end - len(images)
        is_theirs = start >= 0 and all(map(operator.is_, images, self._given[start:]))
        together = self._images[start:end] if is_theirs else torch.stack([*images])
        self._begin(0)  # so that the memory is freed with the batch
        return together

    def _begin(self, images: int) -> None:
        self._images = torch.empty(images, *self._size, 3, dtype=torch.uint8)
        self._free, self._given = [*self._images.unbind()][::-1], list[Tensor]()
