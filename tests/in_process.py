"""A session whose workers are interpreters in this process: the real thing but for Ray, for tests without it."""

from typing import Any

from raytorch.registry import Registry
from raytorch.session.client import Session
from raytorch.session.interpreter import Interpreter
from raytorch.session.program import Report
from raytorch.session.stream import Future, Parts


class Done:
    """A report that is there already."""

    def __init__(self, packed: bytes) -> None:
        self._report = Report.unpack(packed)  # a copy, as from another process

    def done(self) -> bool:
        return True

    def result(self) -> Report:
        return self._report


class InProcess:
    """A transport to interpreters of one process, without a process group."""

    def __init__(self, workers: int, max_bytes: int | None) -> None:
        self.world_size = workers
        self.interpreters = [Interpreter(Registry(max_bytes), rank=rank) for rank in range(workers)]
        self.programs = 0
        self.skipped = 0

    def send(self, packed: bytes, attachments: list[Parts]) -> list[Future]:
        self.programs += 1
        return [
            Done(interpreter.execute(packed, [parts[rank % len(parts)] for parts in attachments]).pack())
            for rank, interpreter in enumerate(self.interpreters)
        ]

    def skip_clients(self, last: int) -> None:
        self.skipped = last

    def close(self) -> None:
        pass


def local_session(workers: int = 1, max_bytes: int | None = None) -> Session:
    return Session(InProcess(workers, max_bytes))


def registries(session: Session) -> list[Any]:
    transport: Any = session._transport
    return [interpreter.registry for interpreter in transport.interpreters]
