"""A worker's place in its group, the process group, collectives and DDP, for functions in a Ray Train worker."""

from raytorch.distributed.collectives import all_gather, all_reduce, broadcast, reduce_scatter
from raytorch.distributed.ddp import broadcast_buffers, data_parallel, gradient_sync
from raytorch.distributed.exception_causes import failure_cause
from raytorch.distributed.process_group import (
    barrier,
    destroy_process_group,
    init_process_group,
    is_available,
    leaving_process_group,
)
from raytorch.distributed.worker import Worker, device_name

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
