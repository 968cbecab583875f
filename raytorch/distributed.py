"""A worker's place in its group, the process group, and DDP; for functions that run in a Ray Train worker."""

import errno
import itertools
import logging
import os
import warnings
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import HashStore, PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from raytorch.causes import Cause, is_storage_fault, leaves
from raytorch.collectives import agreement, all_gather, all_reduce, broadcast, reduce_scatter
from raytorch.errors import StorageError
from raytorch.overrides import OVERRIDABLE

__all__ = [
    "Worker",
    "all_gather",
    "all_reduce",
    "barrier",
    "broadcast",
    "broadcast_buffers",
    "data_parallel",
    "destroy_process_group",
    "device_name",
    "failure_cause",
    "gradient_sync",
    "init_process_group",
    "is_available",
    "leaving_process_group",
    "reduce_scatter",
]


@dataclass(frozen=True)
class Worker:
    """One worker of the group."""

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def current(cls) -> "Worker":
        """The worker that this process is, with its GPU selected where it holds one."""
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        device = ray.train.torch.get_device()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return cls(context.get_world_rank(), context.get_world_size(), device)


is_available = dist.is_available
"""Whether this PyTorch was built with collectives."""


def init_process_group(backend: str | None = None, timeout_s: float = 1800) -> None:
    """Join the process group of the worker group; does nothing in a process that is in one.

    A Ray Train worker is in one when its function starts, so that this is for after :func:`destroy_process_group`. All
    workers have to come here. A process outside of any worker group becomes a group of one.
    See ``torch.distributed.init_process_group``.

    Args:
        backend: ``nccl`` or ``gloo``; by default nccl where the process has a GPU.
        timeout_s: Seconds after which a collective that makes no progress fails.
    """
    if dist.is_initialized():
        return
    backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    store = PrefixStore(f"group {next(_GROUPS)}", _store()) if world_size > 1 else HashStore()
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s)
    )


def destroy_process_group() -> None:
    """Leave the process group; does nothing without one. See ``torch.distributed.destroy_process_group``."""
    if dist.is_initialized():
        if "MASTER_PORT" in os.environ:
            _store()
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until every worker has come here. See ``torch.distributed.barrier``."""
    if (peers := agreement()) and (peers.has_left or dist.is_initialized()):
        peers.agree("barrier")
    if dist.is_initialized():
        dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)


OVERRIDABLE.update(
    {
        f"{__name__}.{function.__name__}": function
        for function in (is_available, init_process_group, destroy_process_group, barrier)
    }
)


def broadcast_buffers(module: nn.Module) -> None:
    """Give every worker rank 0's buffers (running statistics of batch normalization, say)."""
    for buffer in module.buffers():
        broadcast(buffer)


def data_parallel(module: nn.Module) -> nn.Module:
    """``module`` on this worker's device, wrapped in DistributedDataParallel where there are several workers.

    Buffers are each worker's own in training; see :func:`broadcast_buffers`.
    """
    import ray.train.torch

    if peers := agreement():
        peers.agree(f"data_parallel of {type(module).__name__} with {_shapes_of(module)}")
        peers.averages_gradients = True
    options = {"gradient_as_bucket_view": True, "broadcast_buffers": False}
    prepare = ray.train.torch.prepare_model
    with warnings.catch_warnings(), _only_warnings(prepare.__module__):
        # PyTorch 2.15 has no other option yet for buffers that are not synchronized at the start either, as it says.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        prepared: nn.Module = prepare(module, parallel_strategy_kwargs=options)
    if isinstance(prepared, DistributedDataParallel):
        _WRAPPED.add(prepared)
    return prepared


@contextmanager
def _only_warnings(logger: str) -> Iterator[None]:
    """Keep what a module's logger has to say while all goes well from whoever reads what this process prints."""

    def is_warning(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING

    logging.getLogger(logger).addFilter(is_warning)
    try:
        yield
    finally:
        logging.getLogger(logger).removeFilter(is_warning)


def may_communicate(held: Any) -> bool:
    """Whether a call of ``held`` or of one of its methods may communicate, as code does that is not PyTorch's own."""
    parts = list(held.modules()) if isinstance(held, nn.Module) else [held]
    _WRAPPED.update(part for part in parts if isinstance(part, DistributedDataParallel))
    return any(isinstance(part, _COMMUNICATING) or not _is_torchs_own(part) for part in parts)


_COMMUNICATING = (DistributedDataParallel, nn.SyncBatchNorm)


def _is_torchs_own(held: Any) -> bool:
    module = getattr(held, "__module__", None) or ""
    return module.startswith("torch.") and not module.startswith("torch.distributed")


def _shapes_of(module: nn.Module) -> str:
    shapes = [(parameter.dtype, tuple(parameter.shape)) for parameter in module.parameters()]
    return f"{len(shapes)} parameters ({zlib.crc32(str(shapes).encode()):08x})"


def gradient_sync(module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
    """Whether a forward and backward pass in the block averages gradients over the workers.

    Off while micro-batches accumulate. See ``DistributedDataParallel.no_sync``.
    """
    return module.no_sync() if isinstance(module, DistributedDataParallel) and not enabled else nullcontext()


def device_name(device: torch.device) -> str:
    """The GPU's product name, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@contextmanager
def leaving_process_group() -> Iterator[None]:
    """Destroy the process group when the block ends well; after an error peers may be gone, so Ray ends the process."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def failure_cause(error: BaseException) -> Cause:
    """What an exception on a worker tells of: memory that ran out, other workers or hardware gone, or a mistake.

    PyTorch, gloo and NCCL raise plain ``RuntimeError`` in places, so the text is looked at as well. Of a group's
    exceptions, one that a restart would only meet again decides.
    """
    if isinstance(error, BaseExceptionGroup):
        return min(map(failure_cause, leaves(error)), key=lambda cause: (not cause.is_final, cause is Cause.ERROR))
    text = str(error).lower()
    if isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and _says(text, _NO_GPU_MEMORY)):
        return Cause.GPU_MEMORY
    if _lacks_memory(error) or (isinstance(error, RuntimeError) and _says(text, _NO_HOST_MEMORY)):
        return Cause.HOST_MEMORY
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _says(text, _COLLECTIVES)):
        return Cause.TIMEOUT if _says(text, _WAITED_IN_VAIN) else Cause.LOST_WORKER
    if isinstance(error, StorageError) or is_storage_fault(error):
        return Cause.STORAGE
    return Cause.LOST_WORKER if isinstance(error, (torch.AcceleratorError, ConnectionError)) else Cause.ERROR


_NO_GPU_MEMORY = ("cuda out of memory", "cuda error: out of memory", "failure 'out of memory'", "_status_alloc_failed")
_NO_HOST_MEMORY = ("defaultcpuallocator: can't allocate memory", "defaultcpuallocator: not enough memory")
_COLLECTIVES = ("gloo", "nccl", "connection closed by peer")
_WAITED_IN_VAIN = ("timed out", "timeout")


def _says(text: str, phrases: tuple[str, ...]) -> bool:
    return any(phrase in text for phrase in phrases)


def _lacks_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)


_GROUPS = itertools.count()
"""Numbers for the groups that :func:`init_process_group` joins: none may read what an earlier one left in the store."""


class RenewableGroup:
    """The workers' process group, of which one worker can close its part, and all can make a new one.

    Args:
        timeout_s: Seconds after which a collective of a new group fails that makes no progress.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout = timedelta(seconds=timeout_s)

    def leave(self) -> bool:
        """Close this worker's part, so that others who wait for it fail; whether there was one that can be closed.

        NCCL's others would wait on.
        """
        if not dist.is_initialized() or dist.get_backend() != "gloo":
            return False
        for module in _WRAPPED:
            vars(module).update(dict.fromkeys(_GROUPS_OWN))
        dist.destroy_process_group()  # which closes its connections, as nobody else has it
        return True

    def renew(self, number: int) -> None:
        """Join the group of that number with all other workers, and let all DistributedDataParallel use it."""
        self.leave()
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = PrefixStore(f"renewed {number}", _store())
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=self._timeout)
        for module in _WRAPPED:
            restore: Any = module.__setstate__  # as when it is unpickled
            restore({name: value for name, value in vars(module).items() if name not in _GROUPS_OWN})


_WRAPPED: WeakSet[DistributedDataParallel] = WeakSet()
"""Those that this process has seen, and that use the group."""
_GROUPS_OWN = ("process_group", "reducer", "logger")
"""What a DistributedDataParallel keeps of its process group, and makes anew when it is unpickled."""


@cache
def _store() -> Any:
    return connect_store()


def connect_store() -> Any:
    """A new connection of this process's to the store where Ray Train's workers met.

    On rank 0 it holds the server, so that one worker can join the next group before another has left this one.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_master = os.environ["RANK"] == "0"
    return TCPStore(address, port, is_master=is_master, multi_tenant=True, wait_for_workers=False)
