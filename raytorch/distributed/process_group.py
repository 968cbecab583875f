"""The process group of a worker group: joining and leaving it, and making it anew after a worker's failure."""

import gc
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from types import FunctionType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, TCPStore  # type: ignore[attr-defined]

from raytorch.distributed.collectives import agreement
from raytorch.distributed.ddp import WRAPPED
from raytorch.tensor_ops import OVERRIDABLE

is_available = dist.is_available
"""True if this PyTorch was built with collectives."""


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


for _function in (is_available, init_process_group, destroy_process_group, barrier):
    OVERRIDABLE[f"raytorch.distributed.{_function.__name__}"] = _function


@contextmanager
def leaving_process_group() -> Iterator[None]:
    """Destroy the process group when the block ends well; after an error peers may be gone, so Ray ends the process."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


_GROUPS = itertools.count()
"""Numbers for the groups that :func:`init_process_group` joins: none may read what an earlier one left in the store."""


class RenewableGroup:
    """The workers' process group, of which one worker can close its part, and all can make a new one."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout = timedelta(seconds=timeout_s)

    def leave(self) -> bool:
        """Close this worker's part, so that others who wait for it fail; whether there was one that can be closed.

        NCCL's others would wait on.
        """
        if not dist.is_initialized() or dist.get_backend() != "gloo":
            return False
        for module in WRAPPED:
            vars(module).update(dict.fromkeys(_GROUPS_OWN))
        group = dist.group.WORLD
        dist.destroy_process_group()
        _release(group)
        del group  # which closes its connections, as nobody else has it
        return True

    def renew(self, number: int) -> None:
        """Join the group of that number with all other workers, and let all DistributedDataParallel use it."""
        self.leave()
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = PrefixStore(f"renewed {number}", _store())
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=self._timeout)
        for module in WRAPPED:
            restore: Any = module.__setstate__  # as when it is unpickled
            restore({name: value for name, value in vars(module).items() if name not in _GROUPS_OWN})


def _release(group: Any) -> None:
    """Put None, for whichever group there is, where default arguments hold this one, as in torch.distributed.nn."""
    for function in gc.get_objects():
        if type(function) is not FunctionType:  # isinstance would ask proxies, whose answer may be anything
            continue
        if any(value is group for value in function.__defaults__ or ()):
            function.__defaults__ = tuple(None if value is group else value for value in function.__defaults__ or ())
        named = function.__kwdefaults__ or {}
        for name in [name for name, value in named.items() if value is group]:
            named[name] = None


_GROUPS_OWN = ("process_group", "reducer", "logger")
"""Attributes of a DistributedDataParallel that hold its process group, and makes anew when it is unpickled."""


def connect_store() -> Any:
    """A new connection of this process's to the store where Ray Train's workers met.

    On rank 0 it holds the server, so that one worker can join the next group before another has left this one.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_master = os.environ["RANK"] == "0"
    return TCPStore(address, port, is_master=is_master, multi_tenant=True, wait_for_workers=False)


_store = cache(connect_store)
