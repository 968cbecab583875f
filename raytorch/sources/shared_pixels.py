"""Decoded images in memory that the processes of a machine that read a data set share.

The memory is a file without a name, made with the data set: processes that are forked from the one that has it find in
it what any of them has put there, and it goes when the last of them has. Nothing of it is in /dev/shm.
"""

import fcntl
import os
import tempfile
from mmap import mmap
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raytorch.system.memory import memory

SHARE = 2
"""The part of the free memory that a machine's data sets may fill is one of so many."""
RESERVE = 4
"""A part of all memory, one of so many, is left free whatever a data set could fill."""
CHUNK = 16 << 20
_ALIGNMENT = 64
_SHAPE = np.dtype(np.int32)


class SharedPixels:
    """Images by their numbers, as many as there is memory for. Used by a single thread of each process.

    Each process writes into chunks of its own, so that they meet only when one takes a chunk. An image is there for the
    others when its place is written into a table, which is a single store of 8 bytes.

    Example:
        >>> kept = SharedPixels(10, share_of_machine())
        >>> kept.put(3, torch.zeros(32, 48, 3, dtype=torch.uint8))
        >>> kept.get(3).shape
        torch.Size([32, 48, 3])
    """

    def __init__(self, images: int, bound: int) -> None:
        """``images`` at most, in at most ``bound`` bytes, which are taken as they are needed."""
        self._images, self._bound = images, bound
        self._make()

    def get(self, number: int) -> Tensor | None:
        """An image, uint8 (H, W, 3), that is to be left as it is; None if it is not there."""
        place = int(self._places[number])
        if not place:
            return None
        first = place // _SHAPE.itemsize
        height, width = self._shapes[first], self._shapes[first + 1]
        return self._pixels.as_strided((height, width, 3), (3 * width, 3, 1), place + 2 * _SHAPE.itemsize)

    def put(self, number: int, pixels: Tensor) -> None:
        """Keep an image, uint8 (H, W, 3), if there is room for it."""
        size = 2 * _SHAPE.itemsize + pixels.numel()
        if not (place := self._room(size)):
            return
        into = np.frombuffer(self._memory, np.uint8, size, place)
        into[: 2 * _SHAPE.itemsize].view(_SHAPE)[:] = pixels.shape[:2]
        into[2 * _SHAPE.itemsize :] = pixels.reshape(-1).numpy()
        self._places[number] = place

    def __len__(self) -> int:
        """How many images are there."""
        return int(np.count_nonzero(self._places))

    def __getstate__(self) -> dict[str, Any]:
        return {"_images": self._images, "_bound": self._bound}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make()

    def _make(self) -> None:
        """It begins with the end of the chunks that are taken and the table of places."""
        first = _padded(8 * (1 + self._images), CHUNK)
        self._size = first + self._bound // CHUNK * CHUNK
        self._file = _unnamed_file()
        os.truncate(self._file, self._size)
        self._memory = mmap(self._file, self._size)
        numbers = np.frombuffer(self._memory, np.int64, 1 + self._images)
        self._taken, self._places = numbers[:1], numbers[1:]
        # Of all of it, as a look-up in these takes less time than making others.
        self._shapes = memoryview(self._memory).cast("i")  # as _SHAPE
        self._pixels = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._taken[0] = first
        self._own = (0, 0, 0)
        """The process whose chunk it is, where it goes on in it, and its end."""

    def _room(self, size: int) -> int:
        """A place of ``size`` bytes; 0 if there is none."""
        owner, start, end = self._own
        if owner != os.getpid():
            start = end = 0
        if end - start < size:
            start, end = self._chunks(size)
            if not start:
                return 0
        self._own = (os.getpid(), start + _padded(size, _ALIGNMENT), end)
        return start

    def _chunks(self, size: int) -> tuple[int, int]:
        wanted = _padded(size, CHUNK)
        fcntl.lockf(self._file, fcntl.LOCK_EX)  # the system opens it if the process is killed
        try:
            start = int(self._taken[0])
            if start + wanted > self._size or not _has_room(wanted):
                return 0, 0
            self._taken[0] = start + wanted
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)
        return start, start + wanted

    def __del__(self) -> None:
        if "_file" in self.__dict__:
            os.close(self._file)


def share_of_machine() -> int:
    """Bytes that a data set of this process may fill: of what is free a part, divided by the machine's workers."""
    there = memory()
    workers = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return there.free // SHARE // max(1, int(workers) if workers.isdecimal() else 1) if there else 0


def _has_room(wanted: int) -> bool:
    there = memory()
    return there is not None and there.free - wanted >= there.total // RESERVE


def _unnamed_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("raytorch")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _padded(size: int, to: int) -> int:
    return -(-size // to) * to
