"""A session whose workers are processes with a process group: the real thing but for Ray, for tests without it."""

import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from threading import Lock
from typing import Any

import torch
import torch.distributed as dist
from forked import CONTEXT
from ranks import free_port
from torch import nn

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


class Replies:
    """The reports of a process, which come in order; any thread may wait for one."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._waiting: deque[Reply] = deque()
        self._taking = Lock()

    def expect(self) -> "Reply":
        self._waiting.append(Reply(self))
        return self._waiting[-1]

    def take(self, wanted: "Reply", *, wait: bool) -> None:
        """Hand out reports until ``wanted`` has its own, or, without ``wait``, as far as they are there."""
        if self._taking.acquire(blocking=wait):
            try:
                while wanted.report is None and (wait or self._pipe.poll()):
                    report = Report.unpack(self._pipe.recv())
                    self._waiting.popleft().report = report
            finally:
                self._taking.release()


class Reply:
    """A report that a process will give."""

    def __init__(self, replies: Replies) -> None:
        self._replies = replies
        self.report: Report | None = None

    def done(self) -> bool:
        self._replies.take(self, wait=False)
        return self.report is not None

    def result(self) -> Report:
        self._replies.take(self, wait=True)
        assert self.report is not None
        return self.report


class InProcesses:
    """A transport to processes."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        port = free_port()
        self.processes: list[ForkServerProcess] = []
        self.pipes: list[Connection] = []
        for rank in range(world_size):
            pipe, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=work, args=(rank, world_size, port, theirs), daemon=True)
            process.start()
            self.processes.append(process)
            self.pipes.append(pipe)
        for pipe in self.pipes:
            pipe.recv()
        self._replies = [Replies(pipe) for pipe in self.pipes]

    def send(self, packed: bytes, attachments: list[Parts]) -> list[Future]:
        expected: list[Future] = [replies.expect() for replies in self._replies]  # before any of them can be there
        for rank, pipe in enumerate(self.pipes):
            pipe.send((packed, [parts[rank % len(parts)] for parts in attachments]))
        return expected

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
