"""How large a process becomes on a CPU by the memory that PyTorch asks the C library for, between what stays."""

from bisect import bisect_left, insort

from raytorch.system.allocator import KEPT, LARGEST

_BESIDE = 80
"""Bytes that a tensor takes beside its own: where it may begin, and what the C library writes down."""


class Heap:
    """glibc's heap as :func:`~raytorch.system.allocator.keep_freed_memory` has it, followed by sizes alone.

    What is freed is kept, and taken again by what fits into it best; what is large and fits nowhere is mapped by itself
    and given back.

    Attributes:
        peak: The most bytes that the process has had of it.

    Example:
        >>> heap = Heap()
        >>> heap.take(1, 1000)
        >>> heap.free(1)
        >>> heap.peak
        1088
    """

    def __init__(self) -> None:
        self.peak = self._mapped = self._top = self._resident = 0
        self._taken: dict[int, tuple[int, int]] = {}
        """Where each begins, -1 if it is mapped by itself, and its size."""
        self._free: list[tuple[int, int]] = []
        """Size and beginning of each gap, by size."""
        self._begins: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        """Sizes of the gaps, by their beginnings and ends."""

    def take(self, key: int, size: int) -> None:
        """Memory of so many bytes for what ``key`` names."""
        size = (size + _BESIDE + 15) // 16 * 16
        place = bisect_left(self._free, (size, 0))
        if place < len(self._free):
            gap, begin = self._free[place]
            self._remove(begin, gap)
            if gap > size:
                self._insert(begin + size, gap - size)
        elif size >= LARGEST:
            begin = -1
            self._mapped += size
        else:
            begin, self._top = self._top, self._top + size
            self._resident = max(self._resident, self._top)
        self._taken[key] = begin, size
        self.peak = max(self.peak, self._resident + self._mapped)

    def free(self, key: int) -> None:
        """Give it back."""
        begin, size = self._taken.pop(key)
        if begin < 0:
            self._mapped -= size
            return
        if (before := self._ends.get(begin)) is not None:
            self._remove(begin - before, before)
            begin, size = begin - before, size + before
        if (behind := self._begins.get(begin + size)) is not None:
            self._remove(begin + size, behind)
            size += behind
        if begin + size < self._top:
            self._insert(begin, size)
            return
        self._top = begin
        if self._resident - self._top > KEPT:
            self._resident = self._top

    def _insert(self, begin: int, size: int) -> None:
        insort(self._free, (size, begin))
        self._begins[begin] = self._ends[begin + size] = size

    def _remove(self, begin: int, size: int) -> None:
        del self._free[bisect_left(self._free, (size, begin))]
        del self._begins[begin], self._ends[begin + size]
