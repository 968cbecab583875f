"""The client's stream of instructions to the workers: what is recorded goes out in order, as programs."""

import threading
import time
from collections import deque
from collections.abc import Sequence
from copy import copy
from typing import Any, Protocol

from raytorch.errors import RemoteOpError, SessionLostError
from raytorch.session.program import MOST_PATTERNS, Instruction, Pattern, Program, Report
from raytorch.session.transfer import Payload

PROGRAM_LENGTH = 1000
"""Instructions after which a program is sent."""
IDLE_S = 0.003
"""Seconds for which a recorded instruction waits for company."""
BUSY_S = 0.05
"""Seconds after a program was sent for which the client counts as at work."""
LOOK_ROUND_S = 0.2
"""Seconds after which collected handles are freed, and finished programs heard, when nothing else goes out."""
MAX_IN_FLIGHT = 32
"""Programs that the workers may be behind before the client waits for them."""
LARGE = 1 << 20
"""Bytes of an upload that does not wait for company."""


Parts = Sequence[Payload | None]
"""What travels beside a program: a payload for each rank, None where a rank needs none; or a single one for all."""


class Future(Protocol):
    """A report that a worker will give."""

    def done(self) -> bool:
        """Whether :meth:`result` would not wait."""

    def result(self) -> Report:
        """The report. Raises SessionLostError."""


class Transport(Protocol):
    """The way to the workers of a session."""

    @property
    def world_size(self) -> int:
        """Number of workers."""

    def send(self, packed: bytes, attachments: list[Parts]) -> list[Future]:
        """Send a program to every rank; returns each rank's future.

        Args:
            packed: The program.
            attachments: For each, either one payload per rank, None where a rank needs none, or a single one for all.
        """

    def skip_clients(self, last: int) -> None:
        """Give no client a number up to ``last``. Raises SessionError if one has joined."""

    def close(self) -> None:
        """Leave the session, and end it if it was opened here."""


class Stream:
    """What one client sends. Every method may be called from any thread."""

    def __init__(self, transport: Transport, client: int) -> None:
        self.transport, self._client = transport, client
        self.freed: deque[int] = deque()
        """Handles that were collected; they are freed after all that was recorded before."""
        self._lock = threading.Lock()
        self._known_patterns: list[Pattern] = []
        self._new_patterns: list[bytes] = []
        self._forgets = False
        self._instructions: list[Instruction | int] = []
        self._attachments: list[Parts] = []
        self._in_flight: deque[list[Future]] = deque()
        self._errors: dict[tuple[int, int], RemoteOpError] = {}
        self._raised: set[tuple[int, int]] = set()
        self._recorded = threading.Event()
        self._dozing = False
        self._sent_at = 0.0
        self._ended: SessionLostError | None = None
        self.loss_was_told = False
        """Whether a caller was told that the session is lost, rather than this stream's own thread alone."""
        self._idle = threading.Thread(target=self._flush_when_idle, name="raytorch-flush", daemon=True)
        self._idle.start()

    def append(self, pattern: Pattern, output: Any, leaves: Sequence[Any]) -> None:
        """Record an instruction."""
        with self._lock:
            self._append(pattern, output, leaves)
            self._send_if_full()

    def append_upload(self, pattern: Pattern, output: int, parts: Parts) -> None:
        """Record an instruction whose only argument travels beside the program, as it is now."""
        is_large = any(part and part.nbytes >= LARGE for part in parts)
        if not is_large:  # what waits is copied, as its owner may go on to change it
            parts = [part and part.copy() for part in parts]
        with self._lock:
            self._append(pattern, output, (len(self._attachments),))
            self._attachments.append(parts)
            if is_large:
                self._send()
            self._send_if_full()

    def ask(self, pattern: Pattern, output: int, leaves: Sequence[Any], ranks: Sequence[int]) -> list[Report]:
        """Record an instruction and wait for the reports of some ranks on its result. Raises SessionLostError."""
        with self._lock:
            self._append(pattern, output, leaves)
            futures = self._send(ranks)
        waiting = [futures[rank] for rank in ranks]
        try:
            return [self._hear(future) for future in waiting]
        except KeyboardInterrupt:
            with self._lock:
                self._in_flight.append(waiting)  # what they have to tell of errors is heard later
            raise

    def free(self, handle: int) -> None:
        """Free a handle after all that was recorded before."""
        with self._lock:
            self.freed.append(handle)
            self._free()
            self._send_if_full()

    def flush(self) -> None:
        """Send what is recorded."""
        with self._lock:
            self._send()

    def synchronize(self) -> None:
        """Wait until all ranks have done what was recorded. Raises RemoteOpError, SessionLostError."""
        with self._lock:
            self._require_open()
            if self.freed:
                self._free()
            self._send()
            waiting = list(self._in_flight)
            self._in_flight.clear()
        for futures in waiting:
            for future in futures:
                self._hear(future)
        self.raise_error()

    def raise_error(self) -> None:
        """Raise the first error that has not been raised yet, if there is one."""
        if not self._errors:
            return
        with self._lock:
            for number in sorted(self._errors):
                error = self._errors.pop(number)
                if number not in self._raised:
                    self._raised.add(number)
                    raise copy(error)  # not the one in this frame: no cycle is to keep handles

    def was_raised(self, error: RemoteOpError) -> None:
        """Note that an error is being raised, so that it is not raised for other ranks again."""
        self._raised.add(error.instruction)

    def close(self) -> None:
        """Send nothing more."""
        self._ended = self._ended or SessionLostError("the session is closed; connect again")
        self._recorded.set()
        self._idle.join()

    def _append(self, pattern: Pattern, output: Any, leaves: Sequence[Any]) -> None:
        if self._ended:
            self._require_open()
        if self.freed:
            self._free()
        number = pattern.number
        if number is None:
            number = self._introduce(pattern)
        self._instructions.append((number, output, *leaves))
        if self._dozing:
            self._recorded.set()

    def _introduce(self, pattern: Pattern) -> int:
        """Give a pattern that the workers do not know its number."""
        number = len(self._known_patterns)
        packed = pattern.pack(number)  # what cannot be packed is refused here, before it is recorded
        self._known_patterns.append(pattern)
        self._new_patterns.append(packed)
        pattern.number = number  # last: should Ctrl-C come in between, it is introduced once more
        return number

    def _forget_patterns(self) -> None:
        """Let the workers forget all patterns; those that are used again travel again."""
        for pattern in self._known_patterns:
            pattern.number = None
        self._known_patterns, self._forgets = [], True

    def _send_if_full(self) -> None:
        if len(self._instructions) >= PROGRAM_LENGTH:
            self._send()

    def _require_open(self) -> None:
        if self._ended:
            self.loss_was_told = True
            raise copy(self._ended)

    def _free(self) -> None:
        while self.freed:
            self._instructions.append(self.freed.popleft())

    def _send(self, answer_from: Sequence[int] = ()) -> list[Future]:
        if not self._instructions:
            return []
        program = Program(self._client, tuple(answer_from), self._forgets, self._new_patterns, self._instructions)
        try:
            futures = self.transport.send(program.pack(), self._attachments)
        except KeyboardInterrupt:
            self._ended = SessionLostError(
                "interrupted while it was sent to the workers, of which some may not have it"
            )
            raise
        except SessionLostError as lost:
            self._lose(lost)
            raise
        self._new_patterns, self._instructions, self._attachments = [], [], []  # what could not be sent is kept
        self._forgets = False
        if len(self._known_patterns) >= MOST_PATTERNS:  # now that no instruction waits that has its number
            self._forget_patterns()
        self._sent_at = time.monotonic()
        others = [future for rank, future in enumerate(futures) if rank not in answer_from]
        if others:
            self._in_flight.append(others)
        while len(self._in_flight) > MAX_IN_FLIGHT:
            for future in self._in_flight.popleft():
                self._hear(future)
        return futures

    def _hear(self, future: Future) -> Report:
        """A worker's report, whose errors are noted. Raises SessionLostError."""
        try:
            report = future.result()
        except SessionLostError as lost:
            self._lose(lost)
            raise
        for error in report.errors:
            if error.instruction not in self._raised:
                self._errors.setdefault(error.instruction, error)
        return report

    def _lose(self, lost: SessionLostError) -> None:
        self._ended = copy(lost)  # without the traceback, whose frames keep the caller's values
        self.loss_was_told |= threading.current_thread() is not self._idle

    def _flush_when_idle(self) -> None:
        begun = None
        while not self._ended:
            is_quiet = time.monotonic() - self._sent_at > BUSY_S
            if is_quiet:  # while the client is at work, waking this thread for each program would slow it down
                self._doze()
            time.sleep(IDLE_S)
            waits = self._sent_at if self._instructions else None
            if is_quiet or (waits is not None and waits == begun):  # nothing was sent since the last look
                try:
                    self._send_and_hear()
                except SessionLostError:
                    return  # whoever asks next is told
                except Exception:  # noqa: S112 - it is still there to be sent, and whoever records next meets the error
                    continue
            begun = waits

    def _doze(self) -> None:
        self._dozing = True
        if not self._instructions:
            self._recorded.wait(LOOK_ROUND_S)
        self._dozing = False
        self._recorded.clear()

    def _send_and_hear(self) -> None:
        with self._lock:
            if self.freed:
                self._free()
            self._send()
            self._hear_finished()

    def _hear_finished(self) -> None:
        while self._in_flight and all(future.done() for future in self._in_flight[0]):
            for future in self._in_flight.popleft():
                self._hear(future)
