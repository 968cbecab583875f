"""Cause of an exception on a worker: memory that ran out, others or hardware gone, or a mistake."""

import errno
import re

import torch
import torch.distributed as dist

from raytorch.errors import Cause, ReaderDiedError, StorageError, is_storage_fault, leaves, message_of


def failure_cause(error: BaseException) -> Cause:
    """What an exception on a worker comes from; of a group's, one that a restart would only meet again decides.

    PyTorch, gloo and NCCL raise plain ``RuntimeError`` in places, so the text is looked at as well.
    """
    if isinstance(error, BaseExceptionGroup):
        return min(map(failure_cause, leaves(error)), key=lambda cause: (not cause.is_final, cause is Cause.ERROR))
    text = message_of(error).lower() if isinstance(error, RuntimeError) else ""
    if isinstance(error, torch.OutOfMemoryError) or _NO_GPU_MEMORY.search(text):
        return Cause.GPU_MEMORY
    is_full = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if is_full or isinstance(error, MemoryError) or _NO_HOST_MEMORY.search(text):
        return Cause.HOST_MEMORY
    if isinstance(error, dist.DistError) or _COLLECTIVES.search(text):
        return Cause.TIMEOUT if _WAITED_IN_VAIN.search(text) else Cause.LOST_WORKER
    if isinstance(error, StorageError) or is_storage_fault(error):
        return Cause.STORAGE
    is_loss = isinstance(error, (torch.AcceleratorError, ConnectionError, ReaderDiedError))
    return Cause.LOST_WORKER if is_loss else Cause.ERROR


_NO_GPU_MEMORY = re.compile("cuda out of memory|cuda error: out of memory|failure 'out of memory'|_status_alloc_failed")
_NO_HOST_MEMORY = re.compile("defaultcpuallocator: (?:can't allocate|not enough) memory")
_COLLECTIVES = re.compile("gloo|nccl|connection closed by peer")
_WAITED_IN_VAIN = re.compile("timed out|timeout")
