"""A session whose workers are threads of this process: the real thing but for Ray, for tests without it."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from raytorch.session.instruction_stream import Future, Parts
from raytorch.session.interpreter import Interpreter
from raytorch.session.program import Report
from raytorch.session.registry import Registry
from raytorch.session.session import Session


class Done:
    """A report that is there already."""

    def __init__(self, packed: bytes) -> None:
        self._report = Report.unpack(packed)  # a copy, as from another process

    def done(self) -> bool:
        return True

    def result(self) -> Report:
        return self._report


class InProcess:
    """A transport to interpreters of one process, without a process group.

    Each runs in a thread of its own, so that what PyTorch keeps per thread (``torch.no_grad``, say) has to be sent.
    """

    def __init__(self, workers: int, max_bytes: int | None) -> None:
        self.world_size = workers
        self.interpreters = [Interpreter(Registry(max_bytes), rank=rank) for rank in range(workers)]
        self._threads = [ThreadPoolExecutor(1) for _ in range(workers)]
        self.programs = 0
        self.skipped = 0

    def send(self, packed: bytes, attachments: list[Parts]) -> list[Future]:
        self.programs += 1
        return [
            Done(self._threads[rank].submit(self._execute, rank, packed, attachments).result())
            for rank in range(self.world_size)
        ]

    def _execute(self, rank: int, packed: bytes, attachments: list[Parts]) -> bytes:
        return self.interpreters[rank].execute(packed, [parts[rank % len(parts)] for parts in attachments]).pack()

    def skip_clients(self, last: int) -> None:
        self.skipped = last

    def close(self) -> None:
        for thread in self._threads:
            thread.shutdown()


def local_session(workers: int = 1, max_bytes: int | None = None) -> Session:
    return Session(InProcess(workers, max_bytes))


def registries(session: Session) -> list[Any]:
    transport: Any = session._transport
    return [interpreter.registry for interpreter in transport.interpreters]
