"""Processes that read batches ahead, in the order in which they are asked for."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NoReturn
from weakref import finalize

from raytorch.config.own_calls import code_in_use
from raytorch.datasets.carried_errors import CarriedError
from raytorch.datasets.reader_server import LINES_AT_ONCE, LOOK_S, Ended, Task, ask, received, send
from raytorch.datasets.segments import Arrivals
from raytorch.datasets.shared_values import packed, packed_data
from raytorch.errors import ConfigError, ReaderDiedError

AHEAD = 2
"""Batches that each reader has ready."""
_START = """
import gc, json, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the other process's to decide on
gc.disable()  # what is imported stays
number, worker, sys.path[:] = json.loads(sys.argv[1])
from raytorch.datasets.reader_server import serve
gc.enable()
serve(number, worker)
"""
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""Libraries start threads as they are imported, and what has some must not be forked."""
_PATIENCE_S = 5.0
"""For the end of a server whose lines have ended."""


class Readers:
    """Readers of one data set, started when they are first needed, and there for all of its epochs.

    Example:
        >>> list(Readers(str.upper, 2).read("abc"))
        ['A', 'B', 'C']
    """

    def __init__(self, answer: Callable[[Any], Any], count: int, data: str = "the data set") -> None:
        """Have ``answer`` sent to where the readers will come from, before anything is read.

        Args:
            answer: What is called with each request in one of the processes.
            count: How many there are.
            data: The class of what is sent with it, for messages.

        Raises:
            ConfigError: It cannot be sent.
        """
        server = _server()  # which starts while that is packed
        try:
            file = packed_data(answer)
        except Exception as error:
            raise _cannot_be_sent(data, error) from error
        self._keeper, self._count = _Keeper(server, data, count, file), count
        self._readers: list[_Reader] = []
        self._pass = 0

    def read(self, requests: Iterable[Any]) -> Iterator[Any]:
        """The answers to the requests.

        Raises what ``answer`` raised in a reader, with the traceback that it had there, ReaderDiedError for one that is
        no longer there, and ConfigError if the data set could not be unpacked there.
        """
        self._pass = number_of_pass = self._pass + 1
        for reader in self._readers:
            reader.forget()
        self._readers = self._readers or self._keeper.readers(self._count)
        asked: deque[_Reader] = deque()
        for number, request in enumerate(requests):
            reader = self._readers[number % self._count]
            self._require_pass(number_of_pass)
            reader.ask(request)
            asked.append(reader)
            if len(asked) == AHEAD * self._count:
                yield asked.popleft().answer()
        while asked:
            self._require_pass(number_of_pass)
            yield asked.popleft().answer()
        if number_of_pass == self._pass:
            for reader in self._readers:
                reader.rest()

    def _require_pass(self, number: int) -> None:
        """Refuse to go on with a pass that another has taken the place of, before a reader is asked for it."""
        if number != self._pass:
            raise RuntimeError("the readers of this data set were asked for other batches since; read these anew")


class _Line:
    """This process's end of a line to another, which ends with it."""

    def __init__(self) -> None:
        self.socket, self.theirs = socket.socketpair()
        self.close = finalize(self, _close, self.socket, os.getpid())


def _close(line: socket.socket, process: int) -> None:
    if os.getpid() == process:  # and not one that was forked from it, where that would end the readers of both
        with suppress(OSError):
            line.shutdown(socket.SHUT_RDWR)  # as one that was forked may have the line as well
    line.close()


class _Server:
    """The server of this process, as it knows it."""

    def __init__(self) -> None:
        self.line, self._worker = _Line(), os.getpid()
        theirs = self.line.theirs.fileno()
        arguments = json.dumps([theirs, self._worker, [*map(str, sys.path)]])
        self._process = subprocess.Popen(  # noqa: S603 (this very Python)
            [sys.executable, "-P", "-u", "-c", _START, arguments],
            pass_fds=[theirs],
            stdin=subprocess.DEVNULL,
            env={**os.environ, **dict.fromkeys(_ONE_THREAD, "1")},
            process_group=0,  # a Ctrl-C in the terminal does not come to it, not even before it can ignore that
        )
        self.line.theirs.close()
        finalize(self, _end, self.line.close, self._process, self._worker)

    def is_alive(self) -> bool:
        """False if it has ended, or is that of a process from which this one was forked."""
        return self._worker == os.getpid() and self._process.poll() is None

    def end(self) -> str:
        """What has become of it, in words."""
        try:
            code = self._process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            return "no longer answers"
        return _how(code, "it served them", "what it said is in the worker's log")


def _end(close: Callable[[], object], process: "subprocess.Popen[bytes]", worker: int) -> None:
    close()
    if os.getpid() != worker:
        return
    try:
        process.wait(2 * LOOK_S)
    except subprocess.TimeoutExpired:  # it still imports what it needs, and has forked nothing
        process.kill()
        process.wait()


_lock = threading.Lock()
_last: _Server | None = None


def start_server() -> None:
    """Start the server of this process, if it has none: it takes seconds until the first data set can be read."""
    _server()


def _server() -> _Server:
    """The server of this process, which stays until that ends."""
    global _last
    with _lock:
        if _last is None or not _last.is_alive():
            _last = _Server()
        return _last


class _Keeper:
    """The process that has a data set and forks its readers, as this process knows it."""

    def __init__(self, server: _Server, data: str, count: int, file: int) -> None:
        """It unpacks the ``file`` at once, which is closed in this process."""
        self.line, self._server, self._data = _Line(), server, data
        self._end: Ended | CarriedError | str | None = None
        folder = None
        with suppress(OSError):  # it was deleted
            folder = str(Path.cwd())
        send(server.line.socket, self.line.theirs.detach())
        send(self.line.socket, packed(Task(count, [*map(str, sys.path)], folder, code_in_use())), file)

    def readers(self, count: int) -> "list[_Reader]":
        """Have it fork them."""
        readers = [_Reader(self, f"reader {number + 1} of {count}") for number in range(count)]
        for start in range(0, count, LINES_AT_ONCE):
            send(self.line.socket, *(each.line.theirs.detach() for each in readers[start : start + LINES_AT_ONCE]))
        return readers

    def is_alive(self) -> bool:
        """False if it has ended without a word, as one does that is killed together with the server."""
        return self._server.is_alive()

    def raise_end(self) -> NoReturn:
        """Raise an error that says why there are no readers."""
        if self._end is None:
            self._end = self._told()
        if isinstance(self._end, CarriedError):
            error = self._end.rebuilt()
            raise _cannot_be_sent(self._data, error) from error
        if isinstance(self._end, Ended):
            how = _how(self._end.code, f"it kept {self._data} for them", "let own code raise an exception instead")
            raise ReaderDiedError(f"data.readers: the process that readers come from {how}")
        raise ReaderDiedError(f"data.readers: the server of readers {self._end}")

    def _told(self) -> Any:
        while not wait([self.line.socket], LOOK_S) and self.is_alive():
            pass
        with suppress(EOFError):
            return received(self.line.socket)
        return self._server.end()


class _Reader:
    """One of them, as the process that asks knows it."""

    def __init__(self, keeper: _Keeper, name: str) -> None:
        self.line, self._keeper, self._name, self._unanswered = _Line(), keeper, name, 0
        self._end: Ended | None = None
        self._arrivals = Arrivals()

    def ask(self, request: Any) -> None:
        """Send a request. That the reader has died is told with the first answer that is missing."""
        ask(self.line.socket, request, self._arrivals.left())
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

    def rest(self) -> None:
        """Hold no memory for answers until something is asked, of which there is nothing now."""
        self._arrivals.rest()

    def _received(self) -> Any:
        self._unanswered -= 1
        value = self._end or self._sent()
        if isinstance(value, Ended):
            self._end = value
            how = _how(value.code, "it read a batch", "let own code raise an exception instead")
            raise ReaderDiedError(f"data.readers: {self._name} {how}")
        return value

    def _sent(self) -> Any:
        while not wait([self.line.socket, self._keeper.line.socket], LOOK_S) and self._keeper.is_alive():
            pass
        try:
            return received(self.line.socket, self._arrivals)
        except EOFError:
            self._keeper.raise_end()


def _how(code: int, deed: str, advice: str) -> str:
    """How a process has ended, in words; ``advice`` is for one that has ended by itself."""
    if code >= 0:
        return f"ended with exit status {code} while {deed}; {advice}"
    name = signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
    reason = {
        "SIGKILL": "somebody killed it, or the machine has no memory left for it: take fewer readers",
        "SIGSEGV": "code that is not Python's crashed in it: readers: 0 tells whether that is so without it",
    }
    return f"died of {name} while {deed}; {reason.get(name, 'readers: 0 reads without it')}"


def _cannot_be_sent(data: str, error: BaseException) -> ConfigError:
    return ConfigError(
        f"data.readers: {data} cannot be sent to readers: {type(error).__name__}: {error}; give it __getstate__ that "
        "leaves out what is open, or readers: 0"
    )
