"""Processes of this machine: which one is meant, and what one has left behind. Imports nothing else of raytorch."""

import ctypes
import errno
import os
import signal
import socket
import sys
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Self

POLL_S = 0.05
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_STATE, _PARENT, _BEGAN = 0, 1, 19
"""Places in ``/proc/PID/stat``, behind the command's name."""


@dataclass(frozen=True)
class Process:
    """A process, as a record names it: by its number alone it would be taken for a later one, or for another machine's.

    What the system does not tell (other than Linux) is None.
    """

    host: str
    pid: int
    began: int | None = None
    """When it began, in ticks since the start of the machine."""
    boot: str | None = None
    """Which start of which machine that was."""
    namespace: str | None = None
    """Where its number counts: containers on one machine have numbers of their own."""

    @classmethod
    def current(cls) -> Self:
        """This process."""
        return cls(socket.gethostname(), os.getpid(), _began(os.getpid()), _boot(), _namespace())

    def is_alive(self) -> bool | None:
        """True if it goes on; None if that cannot be told from here. One that only waits to be let go of has ended."""
        here = (self.boot, self.namespace)
        if self.host != socket.gethostname() or here not in ((_boot(), _namespace()), (None, None)):
            return None
        try:
            found = _stat(self.pid)
        except OSError:
            return None if _is_there(self.pid) else False
        if found[_STATE] in "ZX":
            return False
        return None if self.began is None else found[_BEGAN] == str(self.began)


def interrupting_handlers() -> dict[int, Any]:
    """Handlers by which the signals that end a process act like Ctrl-C: SIGTERM, which stops a job, and SIGHUP, of a
    terminal that is closed, unless that is ignored, as ``nohup`` has it."""
    handlers: dict[int, Any] = {signal.SIGTERM: signal.default_int_handler}
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        handlers[signal.SIGHUP] = _hang_up
    return handlers


def _hang_up(*_: object) -> NoReturn:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the shell and the system may both send one
    for stream in (1, 2):
        try:
            os.get_terminal_size(stream)
        except OSError as error:
            if error.errno == errno.EIO:  # a terminal that is gone: each word to it would be an error
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    raise KeyboardInterrupt


def set_handlers(handlers: Mapping[int, Any]) -> dict[int, Any]:
    """Handle signals so; answers the handlers that were there."""
    return {number: signal.signal(number, handler or signal.SIG_DFL) for number, handler in handlers.items()}


def adopt_orphans() -> None:
    """Become the parent of whatever this process's descendants leave behind, where the system can (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with(parent: int) -> None:
    """Have this process killed when its parent ends, whatever it does then, where the system can (Linux).

    It is to be called by what has just been forked; ``parent`` is the process that has forked it, which may be gone by
    now. To the system that is the thread: one that ends before its process ends the child as well.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def end_children(patience: float, but: Collection[int]) -> int:
    """End the processes that this one is the parent of, and theirs, ``but`` for some; answers how many had to be ended.

    They get SIGTERM, and after ``patience`` seconds SIGKILL.
    """
    asked: set[int] = set()
    deadline = time.monotonic() + patience
    while left := living_children(but):
        is_late = time.monotonic() >= deadline
        for pid in left if is_late else left - asked:
            os.kill(pid, signal.SIGKILL if is_late else signal.SIGTERM)  # it is there until it is let go of
        asked |= left
        time.sleep(POLL_S)
    return len(asked)


def living_children(but: Collection[int] = ()) -> set[int]:
    """The processes that this one is the parent of, less those that have ended, which it lets go of."""
    return {pid for pid in children() - set(but) if not _has_ended(pid)}


def _has_ended(child: int) -> bool:
    try:
        return os.waitpid(child, os.WNOHANG)[0] == child
    except ChildProcessError:  # somebody else has waited for it
        return True


def children() -> set[int]:
    """The processes that this one is the parent of; none where the system does not tell (other than Linux)."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if _stat(int(entry.name))[_PARENT] == str(os.getpid()):
                found.add(int(entry.name))
    return found


def kill_writers(folder: Path, *names: str) -> None:
    """Kill this user's processes that keep a file below a folder open and whose names begin so (Linux)."""
    beginnings = tuple(name.encode() for name in names)
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            is_named_so = (entry / "comm").read_bytes().startswith(beginnings)
            if is_named_so and any(file.readlink().is_relative_to(folder) for file in (entry / "fd").iterdir()):
                os.kill(int(entry.name), signal.SIGKILL)


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # as another user
        pass
    return True


def _began(pid: int) -> int | None:
    try:
        return int(_stat(pid)[_BEGAN])
    except OSError:
        return None


def _boot() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _namespace() -> str | None:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return None


def _stat(pid: int) -> list[str]:
    """Read what ``/proc/PID/stat`` says of a process behind its name, which may hold any character."""
    return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].decode().split()
