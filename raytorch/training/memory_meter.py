"""Which memory PyTorch code takes while it runs, and for what: by its tensors, which may be without any memory."""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raytorch.training.heap import Heap

WEIGHTS, CASTS, ACTIVATIONS = "weights", "weights in 16 bits", "activations"
"""Kinds of memory that it tells apart by itself, of those that are held as weights; all else are activations."""
_NUMBER = torch.ops.aten._local_scalar_dense.default
_CASTS = (torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype)


class MemoryMeter(TorchDispatchMode):
    """Adds up the bytes of all tensors that live in its block, by kind.

    What the code of a single operation takes beside its result is not seen.

    Attributes:
        most: The most bytes of each kind that there were at any time.
        peak: Bytes of each kind when there were most of all.
        heap: What the process has by it on a CPU.

    Example:
        >>> meter = MemoryMeter()
        >>> meter.hold("weights", [weight])
        >>> with meter:
        ...     torch.autograd.backward((images @ weight).sum())
        >>> meter.peak["weights"]
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.heap = Heap()
        self._now: Counter[str] = Counter()
        self._known: dict[int, tuple[Any, str, int]] = {}
        """Of each memory that is there, by the identity of what has it: a weak reference, its kind and its bytes."""
        self._guesses = False

    def hold(self, kind: str, tensors: Iterable[Tensor | None]) -> None:
        """Count the memory of these as ``kind`` from now on."""
        for tensor in tensors:
            if tensor is None:
                continue
            storage = tensor.untyped_storage()
            if (known := self._known.get(id(storage))) is not None:
                self._now[known[1]] -= known[2]
                self._now[kind] += known[2]
                self._known[id(storage)] = known[0], kind, known[2]
            else:
                self._add(storage, kind)
        self._look()

    def restart(self) -> None:
        """Look for the most from now on."""
        self.most, self.peak = Counter(), Counter()
        self._look()

    @contextmanager
    def guessing(self) -> Iterator[None]:
        """Let a number that is asked for in the block be 1, as tensors without memory have none."""
        self._guesses = True
        try:
            yield
        finally:
            self._guesses = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._guesses and func is _NUMBER:
            return 1.0 if args[0].dtype.is_floating_point else args[0].dtype == torch.bool or 1
        result = func(*args, **(kwargs or {}))
        is_new = False
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                storage = each.untyped_storage()
                if id(storage) not in self._known:
                    self._add(storage, CASTS if func in _CASTS and self._kind_of(args[0]) == WEIGHTS else ACTIVATIONS)
                    is_new = True
        if is_new:
            self._look()
        return result

    def _kind_of(self, tensor: Tensor) -> str | None:
        known = self._known.get(id(tensor.untyped_storage()))
        return known and known[1]

    def _add(self, storage: Any, kind: str) -> None:
        key, size = id(storage), storage.nbytes()
        self._known[key] = weakref.ref(storage, partial(self._forget, key)), kind, size
        self._now[kind] += size
        self.heap.take(key, size)

    def _forget(self, key: int, _: Any) -> None:
        if known := self._known.pop(key, None):
            self._now[known[1]] -= known[2]
            self.heap.free(key)

    def _look(self) -> None:
        self.most |= self._now
        if self._now.total() > self.peak.total():
            self.peak = self._now.copy()
