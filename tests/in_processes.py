"""A session whose workers are processes with a process group: the real thing but for Ray, for tests without it."""

import os
import socket
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing import get_context

from raytorch.session.instruction_stream import Future, Parts
from raytorch.session.program import Report
from raytorch.session.session import Session

TIMEOUT_S = 60


def work(rank: int, world_size: int, port: int, pipe: Connection) -> None:
    """Execute programs until None comes."""
    import ray.train.torch
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    from raytorch.cluster.worker_group import _meeting_point
    from raytorch.distributed.collectives import agree_through
    from raytorch.distributed.process_group import RenewableGroup, connect_store
    from raytorch.session.interpreter import Interpreter
    from raytorch.session.rank_agreement import Peers
    from raytorch.session.registry import Registry

    def wrapped(module: nn.Module, parallel_strategy_kwargs: dict[str, Any]) -> nn.Module:
        return nn.parallel.DistributedDataParallel(module, **parallel_strategy_kwargs)

    ray.train.torch.prepare_model = wrapped  # Ray's own needs a worker of Ray
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world_size)}
    timeout = timedelta(seconds=TIMEOUT_S)
    store = _meeting_point("127.0.0.1", port, timeout, is_host=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    own = PrefixStore("session", connect_store())
    peers = Peers(own, rank=rank, world_size=world_size, group=RenewableGroup(TIMEOUT_S), timeout_s=TIMEOUT_S)
    agree_through(peers)
    interpreter = Interpreter(Registry(), rank=rank, peers=peers)
    pipe.send(None)
    while (received := pipe.recv()) is not None:
        pipe.send(interpreter.execute(*received).pack())
    dist.destroy_process_group()


class Reply:
    """A report that a process will give; they come in order."""

    def __init__(self, pipe: Connection, waiting: "deque[Reply]") -> None:
        self._pipe, self._waiting = pipe, waiting
        self._report: Report | None = None
        waiting.append(self)

    def done(self) -> bool:
        while self._report is None and self._pipe.poll():
            self._take()
        return self._report is not None

    def result(self) -> Report:
        while self._report is None:
            self._take()
        return self._report

    def _take(self) -> None:
        self._waiting.popleft()._report = Report.unpack(self._pipe.recv())


class InProcesses:
    """A transport to processes."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = get_context("spawn")
        self.processes: list[SpawnProcess] = []
        self.pipes: list[Connection] = []
        for rank in range(world_size):
            pipe, theirs = context.Pipe()
            process = context.Process(target=work, args=(rank, world_size, port, theirs), daemon=True)
            process.start()
            self.processes.append(process)
            self.pipes.append(pipe)
        for pipe in self.pipes:
            pipe.recv()
        self._waiting: list[deque[Reply]] = [deque() for _ in self.pipes]

    def send(self, packed: bytes, attachments: list[Parts]) -> list[Future]:
        for rank, pipe in enumerate(self.pipes):
            pipe.send((packed, [parts[rank % len(parts)] for parts in attachments]))
        return [Reply(pipe, waiting) for pipe, waiting in zip(self.pipes, self._waiting, strict=True)]

    def skip_clients(self, last: int) -> None:
        pass

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(5)
            process.kill()


@contextmanager
def session_of_processes(workers: int) -> Iterator[Session]:
    with Session(InProcesses(workers)) as session:
        yield session
