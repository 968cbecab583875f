"""Functions on the ranks of a process group, without Ray."""

import os
import socket
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from raytorch.distributed import Worker


def on_ranks(check: Callable[[Worker], None], workers: int) -> None:
    """Call ``check``, of the top of a module, on so many ranks; what one of them raises fails the test."""
    if workers == 1:
        check(Worker(0, 1, torch.device("cpu")))
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(_rank, args=(check, workers, port), nprocs=workers)


def _rank(rank: int, check: Callable[[Worker], None], world_size: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    check(Worker(rank, world_size, torch.device("cpu")))
    dist.barrier()
    os._exit(0)  # threads of gloo's that still run when Python ends abort the process now and then
