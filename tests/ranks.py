"""Functions on the ranks of a process group, without Ray."""

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from forked import CONTEXT, PRELOADED
from torch.multiprocessing.spawn import start_processes

from raytorch.distributed import Worker

CONTEXT.set_forkserver_preload([*PRELOADED, "torchmetrics", "torch.distributed.fsdp"])  # which take long to import


def on_ranks(check: Callable[[Worker], None], workers: int) -> None:
    """Call ``check``, of the top of a module, on so many ranks; what one of them raises fails the test."""
    if workers == 1:
        check(Worker(0, 1, torch.device("cpu")))
    else:
        start_ranks(_rank, check, workers, free_port(), workers=workers)


def start_ranks(work: Callable[..., None], *arguments: Any, workers: int) -> None:
    """Call ``work`` in as many processes, with the number of each before the arguments, and wait for their end."""
    start_processes(work, args=arguments, nprocs=workers, start_method="forkserver")


def free_port() -> int:
    """A port of this machine where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank(rank: int, check: Callable[[Worker], None], world_size: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    check(Worker(rank, world_size, torch.device("cpu")))
    dist.barrier()
    os._exit(0)  # threads of gloo's that still run when Python ends abort the process now and then
