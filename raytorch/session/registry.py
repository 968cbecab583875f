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
from raytorch.datasets.in_memory import Dataset
from raytorch.errors import HandleError, QuotaError, RemoteOpError


class HandleKind(StrEnum):
    """Kind of the value that a handle names."""

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
    """Result that an operation that failed did not give."""


@dataclass(eq=False, slots=True)
class FailedValue:
    """Stands in the registry for what a failed operation did not give."""

    error: RemoteOpError


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
        max_bytes: Bytes of tensor storage that the handles may hold together, with gradients, optimizers' states and
            whatever else :func:`tensors_of` finds; None for no limit. Counting takes time with each call of an object,
            some microseconds for each of the parameters there are. Views share their storage, which counts once.
            What autograd keeps for a backward pass is not counted.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        self.values: dict[int, Any] = {}
        """Values that the handles name; to be read only."""
        self.recipes: WeakKeyDictionary[Any, Recipe] = WeakKeyDictionary()
        """How objects were made, in the order in which they were, for as long as they live."""
        self._next = itertools.count(1)
        self._storages = None if max_bytes is None else _Storages(max_bytes)

    @property
    def is_limited(self) -> bool:
        """True if there is a limit, for which what grows has to be counted again."""
        return self._storages is not None

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

    def get(self, handle: int, kind: HandleKind | None = None) -> Any:
        """Return what ``handle`` names. Raises HandleError: it names nothing (any more), or nothing of that kind."""
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

    def recount(self, handles: Iterable[int], *, and_growing: bool) -> None:
        """Count again what is held by handles whose values were changed, and, with ``and_growing``, by all that other
        operations let hold more, or less: modules and other objects, and tensors that can have a gradient.

        Raises QuotaError: it has grown beyond the limit, and only what takes no more room is stored until enough is
        freed.
        """
        if self._storages:
            self._storages.recount(handles, and_growing=and_growing)

    def fail_overgrown(self, error: RemoteOpError) -> None:
        """Put a call's error in place of tensors that it has left larger than their memory.

        PyTorch does so where memory that is not its own should be resized, and reads beyond it ever after.
        """
        for handle, value in list(self.values.items()):
            if isinstance(value, Tensor) and not is_lazy(value) and _is_overgrown(value):
                self.put(handle, FailedValue(error))

    def __contains__(self, handle: int) -> bool:
        return handle in self.values

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """Handles and what they name, as of now."""
        return iter(list(self.values.items()))

    def stats(self) -> dict[str, dict[str, Any]]:
        """Per kind the number of handles, and per device the bytes of the tensors' storages.

        What a value holds beside itself counts as its own: a module's parameters, an optimizer's state, gradients; see
        :func:`tensors_of`. A storage counts once, for the first handle that holds it.
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
        self._held: dict[int, tuple[Any, dict[int, int]]] = {}  # handle -> value, and its storages' bytes by address
        self._growing: set[int] = set()
        self._sizes: dict[int, int] = {}
        self._holders: Counter[int] = Counter()
        self._total = 0
        self._lock = threading.Lock()

    def add(self, handle: int, value: Any) -> None:
        storages = _storages_of(value)
        with self._lock:
            most = max(self._limit, self._total)  # what takes no more room than it gives is let in at any time
            replaced = self._remove(handle)
            before = self._total
            self._hold(handle, value, storages)
            if self._total > most:
                wanted = self._total - before
                self._remove(handle)
                if replaced:
                    self._hold(handle, *replaced)
                raise QuotaError(
                    f"{wanted:,} bytes more would exceed the session's quota: {before:,} of {self._limit:,} bytes "
                    "are in use; free tensors, or connect with a larger max_bytes"
                )

    def recount(self, handles: Iterable[int], *, and_growing: bool) -> None:
        with self._lock:
            before = self._total
            for handle in self._growing.union(handles) if and_growing else handles:
                if held := self._remove(handle):
                    self._hold(handle, held[0], _storages_of(held[0]))
            if self._total > max(self._limit, before):
                raise QuotaError(
                    f"{self._total - before:,} bytes more, of gradients, optimizer state or what else objects came "
                    f"to hold, exceed the session's quota: {self._total:,} of {self._limit:,} bytes are in use; free "
                    "tensors, drop gradients with zero_grad(), or connect with a larger max_bytes"
                )

    def remove(self, handle: int) -> None:
        with self._lock:
            self._remove(handle)

    def _hold(self, handle: int, value: Any, storages: dict[int, int]) -> None:
        for address, size in storages.items():
            self._total += size - self._sizes.get(address, 0)
            self._sizes[address] = size
            self._holders[address] += 1
        self._held[handle] = value, storages
        if _can_grow(value):
            self._growing.add(handle)

    def _remove(self, handle: int) -> tuple[Any, dict[int, int]] | None:
        held = self._held.pop(handle, None)
        self._growing.discard(handle)
        for address in held[1] if held else ():
            self._holders[address] -= 1
            if not self._holders[address]:
                del self._holders[address]
                self._total -= self._sizes.pop(address)
        return held


def _storages_of(value: Any) -> dict[int, int]:
    storages = [tensor.untyped_storage() for tensor in tensors_of(value)]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def _is_overgrown(tensor: Tensor) -> bool:
    if tensor.layout != torch.strided or not tensor.numel():
        return False
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return bool((tensor.storage_offset() + last + 1) * tensor.element_size() > tensor.untyped_storage().nbytes())


def _can_grow(value: Any) -> bool:
    """Tell whether a value may come to hold more by operations other than those that work in place on it."""
    if isinstance(value, Tensor):
        return isinstance(value, nn.Parameter) or (value.requires_grad and _has_gradient_of_its_own(value))
    return not isinstance(value, FailedValue)


_KINDS: list[tuple[type, HandleKind]] = [
    (Tensor, HandleKind.TENSOR),
    (FailedValue, HandleKind.FAILED),
    (torch.jit.ScriptModule, HandleKind.SCRIPT),
    (DistributedDataParallel, HandleKind.DDP),
    (nn.Module, HandleKind.MODULE),
    (torch.optim.Optimizer, HandleKind.OPTIMIZER),
    (torch.optim.lr_scheduler.LRScheduler, HandleKind.SCHEDULER),
    (Context, HandleKind.CONTEXT),
    (CustomFunction, HandleKind.FUNCTION),
    (Dataset, HandleKind.DATASET),
]
"""Kinds by type; the first that fits counts."""


def kind_of(value: Any) -> HandleKind:
    """The kind of a value, by its type."""
    for kind_type, kind in _KINDS:
        if isinstance(value, kind_type):
            return kind
    onnx = sys.modules.get("raytorch.onnx")  # which takes seconds to import, and made the value if it is of its kind
    if onnx and isinstance(value, onnx.OnnxModel):
        return HandleKind.ONNX
    if isinstance(value, list | tuple) and value and all(isinstance(part, Tensor) for part in value):
        return HandleKind.TENSOR_LIST
    return HandleKind.OBJECT


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The dense tensors that a registered value holds; none that a lazy module has yet to shape.

    Those in sequences and dictionaries, modules, optimizers, schedulers and contexts, the parts of sparse tensors, and
    the gradients of all these; not what is in an object of another class.
    """
    parts, seen = [value], set()
    for part in parts:  # which grows meanwhile, and keeps what is in it, so that no id is given out again
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, Tensor) and part.layout == torch.strided and not is_lazy(part):
            yield part
        parts.extend(_parts_of(part))


def _parts_of(value: Any) -> Iterable[Any]:
    match value:
        case Tensor():
            return _parts_of_tensor(value)
        case nn.Module():
            return (*value.parameters(), *value.buffers())
        case torch.optim.Optimizer():
            return value.param_groups, value.state
        case torch.optim.lr_scheduler.LRScheduler():
            return (value.optimizer,)
        case Context():
            return vars(value), vars(value._ctx)
        case list() | tuple() | set():
            return value
        case dict():
            return value.values()
    return ()


def _parts_of_tensor(tensor: Tensor) -> Iterator[Tensor]:
    if tensor.layout == torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    if _has_gradient_of_its_own(tensor) and tensor.grad is not None:
        yield tensor.grad


def _has_gradient_of_its_own(tensor: Tensor) -> bool:
    return tensor.is_leaf or tensor.retains_grad
