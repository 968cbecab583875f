"""Processes that read batches ahead, in the order in which they are asked for.

They are forked, so that they have the user's data set without importing its code again, and a request is a few numbers.
"""

import multiprocessing
import os
import pickle
import signal
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from weakref import finalize

import torch

from raytorch.datasets.carried_errors import CarriedError
from raytorch.datasets.shared_values import packed, unpacked
from raytorch.errors import ReaderDiedError

AHEAD = 2
"""Batches that each reader has ready."""
LOOK_S = 1.0
"""Seconds between two looks whether the process at the other end is still there, where its end of the line is held by
one that it has started."""
_SIZE = struct.Struct("<q")


class Readers:
    """Readers of one data set, started when they are first needed and there for all of its epochs.

    Example:
        >>> list(Readers(str.upper, 2).read("abc"))
        ['A', 'B', 'C']
    """

    def __init__(self, answer: Callable[[Any], Any], count: int) -> None:
        """``answer`` is called with each request in one of the ``count`` processes."""
        self._answer, self._count = answer, count
        self._started: list[_Reader] = []

    def read(self, requests: Iterable[Any]) -> Iterator[Any]:
        """The answers to the requests.

        Raises what ``answer`` raised in a reader, with the traceback that it had there, and ReaderDiedError for one
        that is no longer there.
        """
        for reader in self._started:
            reader.forget()
        asked: deque[_Reader] = deque()
        for number, request in enumerate(requests):
            reader = self._reader(number % self._count)
            reader.ask(request)
            asked.append(reader)
            if len(asked) == AHEAD * self._count:
                yield asked.popleft().answer()
        while asked:
            yield asked.popleft().answer()

    def _reader(self, number: int) -> "_Reader":
        if number == len(self._started):
            lines = [reader.line for reader in self._started]
            self._started.append(_Reader(self._answer, f"reader {number + 1} of {self._count}", lines))
        return self._started[number]


class _Reader:
    """One of them, as the process that asks knows it."""

    def __init__(self, answer: Callable[[Any], Any], name: str, others: list[socket.socket]) -> None:
        self._name, self._unanswered = name, 0
        self.line, theirs = socket.socketpair()
        context = multiprocessing.get_context("fork")
        # The lines that it inherits are closed there, or they would stay open when this process is killed.
        arguments = (answer, theirs, [self.line, *others], os.getpid())
        self._process: BaseProcess = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        finalize(self, self.line.close)  # at which the process ends

    def ask(self, request: Any) -> None:
        """Send a request."""
        content = pickle.dumps(request)
        with suppress(ConnectionError):  # that it has died is told with the first answer that is missing
            self.line.sendall(_SIZE.pack(len(content)) + content)
        self._unanswered += 1

    def answer(self) -> Any:
        """The answer to the oldest request that has none."""
        value = self._received()
        if isinstance(value, CarriedError):
            raise value.rebuilt()
        return value

    def forget(self) -> None:
        """Leave what was asked and not fetched."""
        while self._unanswered:
            self._received()

    def _received(self) -> Any:
        self._unanswered -= 1
        while not wait([self.line], LOOK_S):
            if not self._process.is_alive():
                break
        files: list[int] = []
        with suppress(ConnectionError, BlockingIOError):
            _, files, _, _ = socket.recv_fds(self.line, 1, 1, socket.MSG_DONTWAIT)
        if not files:
            raise ReaderDiedError(f"data.readers: {self._name} {self._end()}")
        return unpacked(files[0])

    def _end(self) -> str:
        """What has become of the process, in words."""
        self._process.join(LOOK_S)
        code = self._process.exitcode
        if code is None:
            return "no longer answers"
        if code >= 0:
            return f"ended with exit status {code} while it read a batch; let own code raise an exception instead"
        name = signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
        reason = {
            "SIGKILL": "somebody killed it, or the machine has no memory left for it: take fewer readers",
            "SIGSEGV": "code that is not Python's crashed in it: readers: 0 tells whether that is so without it",
        }
        return f"died of {name} while it read a batch; {reason.get(name, 'readers: 0 reads without it')}"


def _serve(answer: Callable[[Any], Any], line: socket.socket, others: list[socket.socket], parent: int) -> None:
    """Answer requests until the process that asks is gone."""
    for other in others:
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the other process's to decide on
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    while True:
        while not wait([line], LOOK_S):
            if os.getppid() != parent:
                return
        try:
            request = _next_request(line)
        except (ConnectionError, EOFError):
            return
        file = _answered(answer, request)
        with suppress(ConnectionError):
            socket.send_fds(line, [b"."], [file])
        os.close(file)


def _next_request(line: socket.socket) -> Any:
    [size] = _SIZE.unpack(_exactly(line, _SIZE.size))
    return pickle.loads(_exactly(line, size))  # noqa: S301 (of the process that has started this one)


def _exactly(line: socket.socket, size: int) -> bytes:
    content = bytearray()
    while len(content) < size:
        if not (more := line.recv(size - len(content))):
            raise EOFError
        content += more
    return bytes(content)


def _answered(answer: Callable[[Any], Any], request: Any) -> int:
    """The file of an answer, or of what was raised in place of one: SystemExit and the like are no ends of a reader."""
    try:
        value = answer(request)
        try:
            return packed(value)
        except Exception as error:
            raise TypeError(f"a batch cannot be sent by a reader, which pickles it: {error}; or readers: 0") from error
    except BaseException as error:
        return packed(CarriedError.of(error, below=str(Path(__file__).parent)))
