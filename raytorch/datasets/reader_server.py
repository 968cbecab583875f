"""The processes that readers come from. A process that trains is full of threads, and so is never forked itself.

    worker -> server -+-> keeper of a data set -+-> reader 1
                      |                         +-> reader 2
                      +-> keeper of another     +-> ...

The server is started as a Python of its own, once for a worker: it imports what all of them need, and runs no code of
the user's. For each data set it forks a keeper, which unpacks it and then forks the readers, so that they have it in
common. None has a second thread when it forks. Each has a line to the worker, on which what has forked it tells how it
ended. When the worker is gone the server ends, and with each process the system kills those that it has forked.
"""

import gc
import os
import pickle
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import torch

from raytorch.config.code_snapshot import CodeSnapshot
from raytorch.config.own_calls import use_code
from raytorch.datasets.carried_errors import CarriedError
from raytorch.datasets.segments import Arrivals, Segments
from raytorch.datasets.shared_values import packed, unpacked
from raytorch.system.processes import adopt_orphans, die_with, end_children

LOOK_S = 1.0
"""Seconds between two looks whether a process is still there whose end of a line others may hold, of its children."""
LINES_AT_ONCE = 100
"""The system sends 253 at most."""
_CLOSED_BY_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
_SIZE = struct.Struct("<q")
_NUMBER = struct.Struct("<i")
_NO_NUMBER = -1
"""Of what comes in a file of its own."""


class Task(NamedTuple):
    """What a keeper is told before it unpacks a data set."""

    readers: int
    path: list[str]
    folder: str | None
    code: CodeSnapshot | None
    """The user's own, as it is used where the data set comes from."""


class Ended(NamedTuple):
    """In place of an answer: how the process has ended that would have given one."""

    code: int
    """Its exit status; that of a signal is negative."""


def send(line: socket.socket, *files: int, number: int = _NO_NUMBER) -> None:
    """Send files, which are closed here. Nothing is raised if nobody is there, as that is told where one waits."""
    with suppress(ConnectionError):
        if files:
            socket.send_fds(line, [_NUMBER.pack(number)], files)
        else:
            line.sendall(_NUMBER.pack(number))
    for each in files:
        os.close(each)


def received(line: socket.socket, arrivals: Arrivals | None = None) -> Any:
    """The value that has been sent. Raises EOFError if there is none and will be none."""
    number, files = _received(line, 1, socket.MSG_DONTWAIT)
    if arrivals and number != _NO_NUMBER:
        return arrivals.value(number, *files)
    return unpacked(*files)


def _files(line: socket.socket, most: int) -> list[int]:
    return _received(line, most)[1]


def _received(line: socket.socket, most: int, flags: int = 0) -> tuple[int, list[int]]:
    content = b""
    with suppress(ConnectionError, BlockingIOError):
        content, files, _, _ = socket.recv_fds(line, _NUMBER.size, most, flags | _CLOSED_BY_EXEC)
    if not content:
        raise EOFError
    return _NUMBER.unpack(content)[0], files


def ask(line: socket.socket, request: Any, segments: list[int]) -> None:
    """Send a reader a request, and what it may write the answer into."""
    content = pickle.dumps((request, segments))
    with suppress(ConnectionError):
        line.sendall(_SIZE.pack(len(content)) + content)


# -- the server --------------------------------------------------------------------------------------------------------


def serve(number: int, worker: int) -> None:
    """Fork a keeper for each line that comes by the socket ``number``, until the process ``worker`` is gone."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # a thread of the worker's may have held some back
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    adopt_orphans()
    torch.set_num_threads(1)
    gc.freeze()
    with socket.socket(fileno=number) as line, suppress(EOFError):
        keepers = _Children()
        while os.getppid() == worker:
            if keepers.wait(line):
                [theirs] = _files(line, 1)
                keepers.fork(socket.socket(fileno=theirs), _keep, but=[line])
    end_children(0, ())


class _Children:
    """Processes that this one has forked, each with its end of a line."""

    def __init__(self) -> None:
        self.lines: dict[int, socket.socket] = {}
        self._wakes, self._wake = socket.socketpair()
        for each in (self._wakes, self._wake):
            each.setblocking(False)
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def fork(self, line: socket.socket, work: Callable[[socket.socket], None], but: Iterable[socket.socket]) -> None:
        """Do some work with a line in a process of its own, which has none of the other lines, nor those of ``but``."""
        others = [*self.lines.values(), self._wakes, self._wake, *but]
        parent = os.getpid()
        if pid := os.fork():
            self.lines[pid] = line
            return
        status = 1
        try:
            die_with(parent)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for other in others:
                other.close()
            work(line)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(Exception):
                sys.stdout.flush()
            os._exit(status)

    def wait(self, line: socket.socket) -> bool:
        """Wait for ``line``, telling the ends of processes; answers whether it has something."""
        ready = wait([line, self._wakes], LOOK_S)
        with suppress(BlockingIOError):
            self._wakes.recv(4096)
        while (ended := _ended()) is not None:
            pid, status = ended
            if pid in self.lines:  # not one that was adopted
                theirs = self.lines.pop(pid)
                send(theirs, packed(Ended(os.waitstatus_to_exitcode(status))))
                theirs.close()
        return line in ready


def _ended() -> tuple[int, int] | None:
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return (pid, status) if pid else None


# -- a keeper ----------------------------------------------------------------------------------------------------------


def _keep(line: socket.socket) -> None:
    """Unpack a data set and fork its readers; they end when the line does."""
    with suppress(EOFError):
        task, data = _files(line, 2)
        task = unpacked(task)
        try:
            answer = _unpacked_data(task, data)
        except BaseException as error:
            send(line, packed(_carried(error)))
            return
        lines: list[socket.socket] = []
        while len(lines) < task.readers:
            lines += [socket.socket(fileno=each) for each in _files(line, LINES_AT_ONCE)]
        _read(line, lines, answer)


def _unpacked_data(task: Task, data: int) -> Any:
    sys.path[:] = task.path
    if task.folder:
        os.chdir(task.folder)
    if task.code:
        use_code(task.code)
    return unpacked(data, is_own=True)


def _read(line: socket.socket, lines: list[socket.socket], answer: Callable[[Any], Any]) -> None:
    readers = _Children()
    gc.freeze()  # or each reader would write to all objects as it looks for garbage
    for number, theirs in enumerate(lines):
        readers.fork(theirs, lambda own: _answer(own, answer), but=[line, *lines[number + 1 :]])
    while not readers.wait(line):
        pass
    for pid in readers.lines:
        os.kill(pid, signal.SIGKILL)
    for pid in readers.lines:
        os.waitpid(pid, 0)


def _carried(error: BaseException) -> CarriedError:
    return CarriedError.of(error, below=str(Path(__file__).parent))


# -- a reader ----------------------------------------------------------------------------------------------------------


def _answer(line: socket.socket, answer: Callable[[Any], Any]) -> None:
    """Answer requests, until nobody is there to ask."""
    segments = Segments()
    with suppress(ConnectionError, EOFError):
        while True:
            request, free = _next_request(line)
            segments.take_back(free)
            number, file = _answered(answer, request, segments)
            send(line, *([] if file is None else [file]), number=number)


def _next_request(line: socket.socket) -> Any:
    [size] = _SIZE.unpack(_exactly(line, _SIZE.size))
    return pickle.loads(_exactly(line, size))  # noqa: S301 (of the process that all this is for)


def _exactly(line: socket.socket, size: int) -> bytes:
    content = bytearray()
    while len(content) < size:
        if not (more := line.recv(size - len(content))):
            raise EOFError
        content += more
    return bytes(content)


def _answered(answer: Callable[[Any], Any], request: Any, segments: Segments) -> tuple[int, int | None]:
    """Where an answer is, or what was raised in place of one: SystemExit and the like are no ends of a reader."""
    try:
        value = answer(request)
        try:
            return segments.put(value)
        except Exception as error:
            raise TypeError(f"a batch cannot be sent by a reader, which pickles it: {error}; or readers: 0") from error
    except BaseException as error:
        return segments.put(_carried(error))
