"""Cause of an exception on a worker: memory that ran out, others or hardware gone, or a mistake."""

import errno

import torch
import torch.distributed as dist

from raytorch.errors import Cause, StorageError, is_storage_fault, leaves, message_of


def failure_cause(error: BaseException) -> Cause:
    """What an exception on a worker comes from; of a group's, one that a restart would only meet again decides.

    PyTorch, gloo and NCCL raise plain ``RuntimeError`` in places, so the text is looked at as well.
    """
    if isinstance(error, BaseExceptionGroup):
        return min(map(failure_cause, leaves(error)), key=lambda cause: (not cause.is_final, cause is Cause.ERROR))
    text = message_of(error).lower()
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
