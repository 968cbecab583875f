"""A worker's place in its group, collectives over tensors, and DDP; for functions that run in a Ray Train worker."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


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


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum of ``tensor`` over all workers, the same on each; in place.

    See ``torch.distributed.all_reduce``.
    """
    if _several_workers():
        dist.all_reduce(tensor)
    return tensor


def all_gather(tensor: Tensor) -> Tensor:
    """``tensor`` of every worker, stacked along a new first dimension in the order of ranks.

    Shapes and dtypes must be the same on all workers. See ``torch.distributed.all_gather``.
    """
    if not _several_workers():
        return tensor.unsqueeze(0)
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return torch.stack(parts)


def broadcast_buffers(module: nn.Module) -> None:
    """Give every worker rank 0's buffers (running statistics of batch normalization, say)."""
    if _several_workers():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def data_parallel(module: nn.Module) -> nn.Module:
    """``module`` on this worker's device, wrapped in DistributedDataParallel where there are several workers.

    Buffers are each worker's own in training; see :func:`broadcast_buffers`.
    """
    import ray.train.torch

    options = {"gradient_as_bucket_view": True, "broadcast_buffers": False}
    return ray.train.torch.prepare_model(module, parallel_strategy_kwargs=options)  # type: ignore[no-any-return]


def gradient_sync(module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
    """Whether a backward pass in the block averages gradients over the workers; off while micro-batches accumulate."""
    inner = getattr(module, "_orig_mod", module)  # what torch.compile wrapped
    return inner.no_sync() if isinstance(inner, DistributedDataParallel) and not enabled else nullcontext()


def device_name(device: torch.device) -> str:
    """The GPU's product name, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@contextmanager
def leaving_process_group() -> Iterator[None]:
    """Destroy the process group when the block ends well; after an error peers may be gone, so Ray ends the process."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def is_lost_peer(error: BaseException) -> bool:
    """Whether ``error`` tells of another worker or of hardware that is gone, rather than of a mistake in the program.

    gloo and NCCL raise plain ``RuntimeError`` in places, so the text is looked at as well.
    """
    if isinstance(error, (dist.DistError, torch.AcceleratorError, ConnectionError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        word in text for word in ("gloo", "nccl", "connection closed by peer")
    )


def _several_workers() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1
