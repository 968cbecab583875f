"""Data-parallel training: DDP, and whether a pass averages gradients over the workers."""

import logging
import warnings
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakSet

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raytorch.distributed.collectives import agreement, broadcast
from raytorch.distributed.sharding import average_over_copies, is_sharded


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
        shapes = [(parameter.dtype, tuple(parameter.shape)) for parameter in module.parameters()]
        digest = f"{len(shapes)} parameters ({zlib.crc32(str(shapes).encode()):08x})"
        peers.agree(f"data_parallel of {type(module).__name__} with {digest}")
        peers.averages_gradients = True
    options = {"gradient_as_bucket_view": True, "broadcast_buffers": False}
    prepare = ray.train.torch.prepare_model
    with warnings.catch_warnings(), _only_warnings(prepare.__module__):
        # PyTorch 2.15 has no other option yet for buffers that are not synchronized at the start either, as it says.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        prepared: nn.Module = prepare(module, parallel_strategy_kwargs=options)
    if isinstance(prepared, DistributedDataParallel):
        WRAPPED.add(prepared)
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
    """True if a call of ``held`` or of one of its methods may communicate, as code does that is not PyTorch's own."""
    parts = list(held.modules()) if isinstance(held, nn.Module) else [held]
    WRAPPED.update(part for part in parts if isinstance(part, DistributedDataParallel))
    return any(map(_communicates, parts))


def _communicates(part: Any) -> bool:
    module = getattr(part, "__module__", None) or ""
    is_torchs_own = module.startswith("torch.") and not module.startswith("torch.distributed")
    return not is_torchs_own or isinstance(part, (DistributedDataParallel, nn.SyncBatchNorm))


def gradient_sync(module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
    """Set whether a forward and backward pass in the block averages gradients over the workers.

    Off while micro-batches accumulate. See ``DistributedDataParallel.no_sync``. The workers that hold a sharded model
    together average them each time, as a whole gradient would take the memory that sharding saves.
    """
    if is_sharded(module):
        average_over_copies(module, enabled)
        return nullcontext()
    return module.no_sync() if isinstance(module, DistributedDataParallel) and not enabled else nullcontext()


WRAPPED: WeakSet[DistributedDataParallel] = WeakSet()
"""Those that this process has seen, and that use the group."""
