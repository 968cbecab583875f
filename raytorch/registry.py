"""Integer handles for what lives on a worker: tensors, modules, optimizers, counted by kind and by bytes."""

import itertools
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from raytorch.autograd import Context, CustomFunction
from raytorch.datasets.sources import Dataset
from raytorch.errors import HandleError, QuotaError, RemoteOpError


class Kind(StrEnum):
    """What a handle names."""

    TENSOR = "tensor"
    TENSOR_LIST = "tensor list"
    CONTEXT = "autograd context"
    FUNCTION = "custom function"
    MODULE = "module"
    DDP = "data-parallel module"
    OPTIMIZER = "optimizer"
    SCHEDULER = "scheduler"
    SCRIPT = "scripted module"
    ONNX = "ONNX session"
    DATASET = "data set"
    OBJECT = "object"
    FAILED = "failed"
    """What an operation that failed did not give."""


class Poison:
    """Stands in the registry for what a failed operation did not give."""

    __slots__ = ("error",)

    def __init__(self, error: RemoteOpError) -> None:
        self.error = error


@dataclass(frozen=True)
class Recipe:
    """How an object was made."""

    factory: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def make(self, device: torch.device) -> Any:
        """Make it; a module is moved to the device, if that is not the CPU."""
        made = self.factory(*self.args, **self.kwargs)
        if isinstance(made, nn.Module) and device.type != "cpu":
            made.to(device)
        return made


class Registry:
    """Values by handle. Every method may be called from any thread.

    Args:
        max_bytes: Bytes of tensor storage that the handles may hold together; None for no limit. Views share their
            storage, which counts once. What autograd keeps for a backward pass is not counted.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        self.values: dict[int, Any] = {}
        """What the handles name; to be read only."""
        self.recipes: WeakKeyDictionary[Any, Recipe] = WeakKeyDictionary()
        """How objects were made, in the order in which they were, for as long as they live."""
        self._next = itertools.count(1)
        self._storages = _Storages(max_bytes) if max_bytes is not None else None

    def new(self, value: Any) -> int:
        """Store ``value`` under a new handle. Raises QuotaError."""
        handle = next(self._next)
        while handle in self.values:
            handle = next(self._next)
        self.put(handle, value)
        return handle

    def put(self, handle: int, value: Any) -> None:
        """Store ``value`` under a handle that the caller chose, in place of what it named. Raises QuotaError."""
        if self._storages:
            self._storages.add(handle, value)
        self.values[handle] = value

    def get(self, handle: int, kind: Kind | None = None) -> Any:
        """What ``handle`` names.

        Raises:
            HandleError: It names nothing (any more), or nothing of that kind.
        """
        try:
            value = self.values[handle]
        except KeyError:
            raise HandleError(f"handle {handle} names nothing: it was freed, or was never given out") from None
        if kind is not None and kind_of(value) != kind:
            raise HandleError(f"handle {handle} names a {kind_of(value)}, not a {kind}")
        return value

    def free(self, handles: Iterable[int]) -> None:
        """Forget handles; those that name nothing are passed over."""
        for handle in handles:
            self.values.pop(handle, None)
            if self._storages:
                self._storages.remove(handle)

    def __contains__(self, handle: int) -> bool:
        return handle in self.values

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """Handles and what they name, as of now."""
        return iter(list(self.values.items()))

    def stats(self) -> dict[str, dict[str, Any]]:
        """Per kind the number of handles, and per device the bytes of the tensors' storages.

        The storages of a module's parameters and buffers count as the module's. A storage counts once, for the first
        handle that holds it.
        """
        counts: Counter[str] = Counter()
        bytes_by: dict[str, Counter[str]] = {}
        seen: set[int] = set()
        for _, value in self:
            kind = kind_of(value)
            counts[kind] += 1
            held = bytes_by.setdefault(kind, Counter())
            for tensor in tensors_of(value):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in seen:
                    seen.add(storage.data_ptr())
                    held[str(tensor.device)] += storage.nbytes()
        return {str(kind): {"count": count, "bytes": dict(bytes_by[kind])} for kind, count in counts.items()}


class _Storages:
    """The tensor storages that handles hold, each counted once."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: dict[int, dict[int, int]] = {}  # handle -> the bytes of its storages by address
        self._holders: Counter[int] = Counter()
        self._total = 0
        self._lock = threading.Lock()

    def add(self, handle: int, value: Any) -> None:
        storages = {
            storage.data_ptr(): storage.nbytes() for storage in (part.untyped_storage() for part in tensors_of(value))
        }
        with self._lock:
            replaced = self._remove(handle)
            before = self._total
            self._hold(handle, storages)
            if self._total > self._limit:
                wanted = self._total - before
                self._remove(handle)
                self._hold(handle, replaced)
                raise QuotaError(
                    f"{wanted:,} bytes more would exceed the session's quota: {before:,} of {self._limit:,} bytes "
                    "are in use; free tensors, or connect with a larger max_bytes"
                )

    def remove(self, handle: int) -> None:
        with self._lock:
            self._remove(handle)

    def _hold(self, handle: int, storages: dict[int, int]) -> None:
        self._total += sum(size for address, size in storages.items() if not self._holders[address])
        self._holders.update(storages.keys())
        self._held[handle] = storages

    def _remove(self, handle: int) -> dict[int, int]:
        storages = self._held.pop(handle, {})
        for address, size in storages.items():
            self._holders[address] -= 1
            if not self._holders[address]:
                del self._holders[address]
                self._total -= size
        return storages


_KINDS: list[tuple[type, Kind]] = [
    (Tensor, Kind.TENSOR),
    (Poison, Kind.FAILED),
    (torch.jit.ScriptModule, Kind.SCRIPT),
    (DistributedDataParallel, Kind.DDP),
    (nn.Module, Kind.MODULE),
    (torch.optim.Optimizer, Kind.OPTIMIZER),
    (torch.optim.lr_scheduler.LRScheduler, Kind.SCHEDULER),
    (Context, Kind.CONTEXT),
    (CustomFunction, Kind.FUNCTION),
    (Dataset, Kind.DATASET),
]
"""Kinds by type; the first that fits counts."""


def kind_of(value: Any) -> Kind:
    """The kind of a value, by its type."""
    for kind_type, kind in _KINDS:
        if isinstance(value, kind_type):
            return kind
    onnx = sys.modules.get("raytorch.onnx")  # which takes seconds to import, and made the value if it is of its kind
    if onnx and isinstance(value, onnx.OnnxModel):
        return Kind.ONNX
    if isinstance(value, list | tuple) and value and all(isinstance(part, Tensor) for part in value):
        return Kind.TENSOR_LIST
    return Kind.OBJECT


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The dense tensors that a registered value holds directly; none that a lazy module has yet to shape."""
    match value:
        case Tensor():
            if value.layout == torch.strided and not is_lazy(value):
                yield value
        case nn.Module():
            for part in (*value.parameters(), *value.buffers()):
                yield from tensors_of(part)
        case list() | tuple():
            for part in value:
                yield from tensors_of(part)
