"""Processes of this machine: what one has left behind. Imports nothing else of raytorch."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

POLL_S = 0.05
_PR_SET_CHILD_SUBREAPER = 36
_PARENT, _STATE = 1, 0
"""Places in ``/proc/PID/stat``, behind the command's name."""


def adopt_orphans() -> None:
    """Become the parent of whatever this process's descendants leave behind, where the system can (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_children(patience: float, but: Collection[int]) -> int:
    """End the processes that this one is the parent of, and theirs; answers how many had to be ended.

    Args:
        patience: Seconds for ending by themselves after SIGTERM, before SIGKILL.
        but: Those that are left alone.
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


def _stat(pid: int) -> list[str]:
    """What ``/proc/PID/stat`` says of a process behind its name, which may hold any character."""
    return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].decode().split()
