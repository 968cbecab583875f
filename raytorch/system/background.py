"""Work in a thread of its own, so that the main one can show how it goes and take Ctrl-C."""

import threading
from collections.abc import Callable

POLL_INTERVAL_S = 0.25


class BackgroundWork:
    """A function that is called at once in a thread of its own.

    Attributes:
        done: Set when it has ended.
        error: Why it ended, if not well.
    """

    def __init__(self, work: Callable[[], object]) -> None:
        self.error: Exception | None = None
        self.done = threading.Event()
        self._work = work
        threading.Thread(target=self._run, daemon=True).start()

    def follow(self, look: Callable[[], object], stop: Callable[[], object]) -> None:
        """Wait for the end, with a ``look`` several times a second; the first Ctrl-C calls ``stop``, the second is
        raised."""
        is_asked = False
        while True:
            try:
                if self.done.wait(POLL_INTERVAL_S):
                    return
                look()
            except KeyboardInterrupt:
                if is_asked:
                    raise
                is_asked = True
                stop()

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:
            self.error = error
        finally:
            self.done.set()
