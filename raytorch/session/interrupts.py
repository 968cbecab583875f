"""Ctrl-C at a time that suits: what must not be left half done is finished first."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

PATIENCE_S = 3.0
"""Seconds after which another Ctrl-C is not postponed any more."""


class _Postponing:
    """A handler of SIGINT that keeps one for later."""

    def __init__(self, handler: object) -> None:
        self._handler = handler
        self._begun = time.monotonic()
        self._frame: FrameType | None = None
        self._has_come = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self._has_come and time.monotonic() - self._begun > PATIENCE_S:
            self._handle(frame)
        self._has_come, self._frame = True, frame

    def restore(self) -> None:
        """Put the earlier handler back, and tell it of what has come."""
        signal.signal(signal.SIGINT, self._handler)  # type: ignore[arg-type]
        if self._has_come:
            self._handle(self._frame)

    def _handle(self, frame: FrameType | None) -> None:
        if callable(self._handler):
            self._handler(signal.SIGINT, frame)


@contextmanager
def interrupts_postponed() -> Iterator[None]:
    """Let Ctrl-C, which Python gives to the main thread alone, wait until the block is done, if that is soon."""
    handler = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or not callable(handler) or isinstance(handler, _Postponing):
        yield
        return
    postponing = _Postponing(handler)
    signal.signal(signal.SIGINT, postponing)
    try:
        yield
    finally:
        postponing.restore()
