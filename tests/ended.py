"""Waiting for the end of processes that the test has not started itself (Linux)."""

import os
import select
from contextlib import suppress


def await_end(*pids: int) -> None:
    """Return when none of them goes on, though perhaps nobody has waited for it; a test that hangs fails."""
    for pid in pids:
        with suppress(ProcessLookupError):
            end = os.pidfd_open(pid)
            select.select([end], [], [])
            os.close(end)
