"""Ctrl-C at a time that suits: what must not be left half done is finished first."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

PATIENCE_S = 3.0
"""Seconds after which another Ctrl-C is not postponed any more."""


@contextmanager
def interrupts_postponed() -> Iterator[None]:
    """Let Ctrl-C, which Python gives to the main thread alone, wait until the block is done, if that is soon."""
    handler = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    is_postponed = getattr(handler, "__module__", None) == __name__  # by a block that this one is in
    if not is_main or not callable(handler) or is_postponed:
        yield
        return
    begun = time.monotonic()
    come: list[FrameType | None] = []

    def postpone(number: int, frame: FrameType | None) -> None:
        if come and time.monotonic() - begun > PATIENCE_S:
            handler(number, frame)
        come.append(frame)

    signal.signal(signal.SIGINT, postpone)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if come:
            handler(signal.SIGINT, come[-1])
