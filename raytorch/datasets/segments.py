"""Memory that batches arrive in, which goes back to the reader that they come from when nobody has a part of them.

New memory for each is cleared by the system, mapped page by page in two processes, and taken back, which takes longer
than to write the batch.
"""

import mmap
import os
from collections import deque
from typing import Any
from weakref import finalize

import numpy as np

from raytorch.datasets.shared_values import parts_of, size_of, unnamed_file, value_in, write

SPARE = 4
"""Segments of a reader that may hold memory while no batch is in them."""
_LEAST = 1 << 16
_REMOVE = getattr(mmap, "MADV_REMOVE", None)


class Segments:
    """Those of a reader, which writes into them."""

    def __init__(self) -> None:
        self._there: dict[int, mmap.mmap] = {}
        self._free: list[int] = []

    def take_back(self, numbers: list[int]) -> None:
        """Have some again."""
        self._free += numbers

    def put(self, value: Any) -> tuple[int, int | None]:
        """Write a value into one: its number, and its file, the caller's to close, if it is new to the receiver.

        Raises what pickle does for a value that cannot be sent.
        """
        parts = parts_of(value)
        number, file = self._room(size_of(parts))
        write(parts, memoryview(self._there[number]))
        return number, file

    def _room(self, size: int) -> tuple[int, int | None]:
        for place in reversed(range(len(self._free))):  # the last, which the processor may have in its cache
            if len(self._there[self._free[place]]) >= size:
                return self._free.pop(place), None
        number = self._free.pop() if self._free else len(self._there)
        file = unnamed_file()
        os.truncate(file, most := max(_LEAST, 1 << (size - 1).bit_length()))  # memory that is not written to is none
        self._there[number] = mmap.mmap(file, most)
        return number, file


class Arrivals:
    """The same segments as the receiver has them."""

    def __init__(self) -> None:
        self._there: dict[int, mmap.mmap] = {}
        self._idle: set[int] = set()
        self._left: deque[int] = deque()
        self._is_open = True

    def value(self, number: int, file: int | None = None) -> Any:
        """The value in one, whose file is closed; it has none if it is known."""
        if file is not None:
            self._there[number] = mmap.mmap(file, 0)
            os.close(file)
        self._idle.discard(number)
        # All that is in it holds on to this array, one way or another.
        whole = np.frombuffer(self._there[number], np.uint8)
        finalize(whole, self._leave, number).atexit = False
        return value_in(whole.data)

    def left(self) -> list[int]:
        """Those of which there is nothing any more, since the last call: they are to be used again."""
        self._is_open = True
        return [self._left.popleft() for _ in range(len(self._left))]

    def rest(self) -> None:
        """Hold no memory but for what is in use, until there are new values."""
        self._is_open = False
        for number in list(self._idle):
            self._empty(number)

    def _leave(self, number: int) -> None:
        """Called when the last part of a value has gone, by whatever thread it was."""
        if len(self._idle) >= SPARE or not self._is_open:
            self._empty(number)
        self._idle.add(number)
        self._left.append(number)

    def _empty(self, number: int) -> None:
        if _REMOVE is not None:
            self._there[number].madvise(_REMOVE)
