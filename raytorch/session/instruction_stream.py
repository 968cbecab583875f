"""The client's stream of instructions to the workers: what is recorded goes out in order, as programs."""

import functools
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from copy import copy
from queue import Empty, SimpleQueue
from threading import get_ident
from typing import Any, Protocol

from raytorch.errors import SessionLostError
from raytorch.session.interrupts import interrupts_postponed
from raytorch.session.program import MOST_PATTERNS, Instruction, Pattern, Program, Report
from raytorch.session.tensor_transfer import Payload
from raytorch.session.unreported_errors import Turn, UnreportedErrors
from raytorch.session.worker_output import show

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
CLOSE_S = 2.0
"""Seconds that the stream's own thread has for its end, unless it waits for workers, who are ended after it."""
LARGE = 1 << 20
"""Bytes of an upload that does not wait for company."""

Parts = Sequence[Payload | None]
"""Attachments that travel beside a program: a payload for each rank, None where a rank needs none; or a single one for
all."""


class Future(Protocol):
    """A report that a worker will give."""

    def done(self) -> bool:
        """Tell whether :meth:`result` would not wait."""

    def result(self) -> Report:
        """The report. Raises SessionLostError."""


class Transport(Protocol):
    """The way to the workers of a session."""

    @property
    def world_size(self) -> int:
        """Number of workers."""

    def send(self, packed: bytes, attachments: list[Parts]) -> list[Future]:
        """Send a program to every rank, and the attachments beside it; returns each rank's future."""

    def skip_clients(self, last: int) -> None:
        """Give no client a number up to ``last``. Raises SessionError if one has joined."""

    def close(self) -> None:
        """Leave the session, and end it if it was opened here."""


class Stream:
    """Stream of what one client sends. Every method may be called from any thread."""

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
        self._showing = threading.RLock()  # a client's stream of text may itself use the session
        self._unshown: set[Future] = set()
        self.untold = UnreportedErrors()
        self._programs = 0
        self._turns: list[Turn] = []
        self._recorded: SimpleQueue[None] = SimpleQueue()  # in C: an Event may stay locked when Ctrl-C interrupts it
        self._dozing = False
        self._sent_at = 0.0
        self._ended: SessionLostError | None = None
        self.is_forked = False
        """True if this process was forked from the one whose stream it is."""
        self.loss_was_told = False
        """True if a caller was told that the session is lost, rather than this stream's own thread alone."""
        self._idle = threading.Thread(target=self._flush_when_idle, name="raytorch-flush", daemon=True)
        self._idle.start()
        _streams().add(self)

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
            self._attachments.append(parts)  # first: should Ctrl-C come in between, it is sent for nothing
            self._append(pattern, output, (len(self._attachments) - 1,))
            if is_large:
                self._send()
            self._send_if_full()

    def ask(self, pattern: Pattern, output: int, leaves: Sequence[Any], ranks: Sequence[int]) -> list[Report]:
        """Record an instruction and wait for the reports of some ranks on its result. Raises SessionLostError."""
        waiting: list[Future] = []
        try:
            with self._lock:
                self._make_room()
                with interrupts_postponed():
                    self._append(pattern, output, leaves)
                    futures = self._send(ranks)
                    waiting = [futures[rank] for rank in ranks]
            reports = [self._hear(future) for future in waiting]
            if self._in_flight:  # what other ranks have told by now
                with self._lock:
                    self._hear_finished()
        except KeyboardInterrupt:
            with self._lock:
                self._in_flight.append(waiting)  # what they have to tell of errors is heard later
            raise
        return reports

    def free(self, handle: int) -> None:
        """Free a handle after all that was recorded before."""
        with self._lock:
            self.freed.append(handle)
            if self._ended:
                return
            self._free()
            self._send_if_full()

    def synchronize(self, *, of_any_thread: bool = False) -> None:
        """Wait until all ranks have done what was recorded. Raises RemoteOpError, SessionLostError."""
        with self._lock:
            self._require_open()
            self._free()
            self._send()
            waiting = list(self._in_flight)
        for futures in waiting:
            for future in futures:
                self._hear(future)
            with self._lock, suppress(ValueError):  # heard meanwhile by another thread
                self._in_flight.remove(futures)
        self.raise_error(of_any_thread=of_any_thread)

    def raise_error(self, *, of_any_thread: bool = False) -> None:
        """Raise the first error that this thread, or any, has yet to be told of; else those of others wait for them."""
        if not self.untold:
            return
        with self._lock:
            error = self.untold.take(of_any_thread=of_any_thread)
        if error is not None:
            raise copy(error)  # not the one in this frame: no cycle is to keep handles

    def close(self) -> None:
        """Send nothing more. What waits for workers may go on to wait, until the transport is closed."""
        self._ended = self._ended or SessionLostError("the session is closed; connect again")
        self._recorded.put(None)
        self._idle.join(CLOSE_S)

    def _append(self, pattern: Pattern, output: Any, leaves: Sequence[Any]) -> None:
        if self._ended:
            self._require_open()
        if self.freed:
            self._free()
        number = self._introduce(pattern) if pattern.number is None else pattern.number
        thread = get_ident()
        if not self._turns or self._turns[-1][1] != thread:
            self._turns.append((len(self._instructions), thread))
        self._instructions.append((number, output, *leaves))
        if self._dozing:
            self._dozing = False  # first: one word is enough
            self._recorded.put(None)

    def _introduce(self, pattern: Pattern) -> int:
        """Give a pattern that the workers do not know its number."""
        number = len(self._known_patterns)
        packed = pattern.pack(number)  # what cannot be packed is refused here, before it is recorded
        self._known_patterns.append(pattern)
        self._new_patterns.append(packed)
        pattern.number = number  # last: should Ctrl-C come in between, it is introduced once more
        return number

    def _send_if_full(self) -> None:
        if len(self._instructions) >= PROGRAM_LENGTH:
            self._send()

    def _require_open(self) -> None:
        if self._ended:
            self.loss_was_told = True
            raise copy(self._ended)

    def _free(self) -> None:
        while self.freed:
            self._instructions.append(self.freed[0])
            self.freed.popleft()  # last: to be freed twice does no harm

    def _send(self, answer_from: Sequence[int] = ()) -> list[Future]:
        if not self._instructions:
            return []
        self._make_room()
        program = Program(self._client, tuple(answer_from), self._forgets, self._new_patterns, self._instructions)
        packed = program.pack()
        with interrupts_postponed():  # the program is sent whole, and known to be, or not at all
            futures = self._dispatch(packed)
            self._unshown.update(futures)
            others = [future for rank, future in enumerate(futures) if rank not in answer_from]
            if others:
                self._in_flight.append(others)
        return futures

    def _make_room(self) -> None:
        """Wait until the workers are not too far behind."""
        while len(self._in_flight) >= MAX_IN_FLIGHT:
            for future in self._in_flight[0]:
                if self._ended:
                    raise copy(self._ended)
                self._hear(future)
            self._in_flight.popleft()

    def _dispatch(self, packed: bytes) -> list[Future]:
        try:
            futures = self.transport.send(packed, self._attachments)
        except KeyboardInterrupt:  # which had been postponed for long
            self._ended = SessionLostError(
                "interrupted while it was sent to the workers, of which some may not have it"
            )
            raise
        except SessionLostError as lost:
            self._lose(lost)
            raise
        self._programs += 1
        self.untold.expect(self._programs, self._turns)
        self._new_patterns, self._instructions, self._attachments = [], [], []  # what could not be sent is kept
        self._forgets, self._turns = False, []
        if len(self._known_patterns) >= MOST_PATTERNS:  # now that no instruction waits that has its number
            for pattern in self._known_patterns:
                pattern.number = None  # for it to travel again where it is used again
            self._known_patterns, self._forgets = [], True
        self._sent_at = time.monotonic()
        return futures

    def _hear(self, future: Future) -> Report:
        """A worker's report: its errors are noted, and its text is shown, once, before this returns, whichever threads
        hear it. Raises SessionLostError."""
        try:
            report = future.result()
        except SessionLostError as lost:
            self._lose(lost)
            raise
        for error in report.errors:
            self.untold.note(error)
        with self._showing:
            if future in self._unshown:
                self._unshown.remove(future)
                show(report.printed)
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
            with suppress(Empty):
                self._recorded.get(timeout=LOOK_ROUND_S)
        self._dozing = False

    def _send_and_hear(self) -> None:
        with self._lock:
            self._free()
            self._send()
            self._hear_finished()

    def _hear_finished(self) -> None:
        while self._in_flight and all(future.done() for future in self._in_flight[0]):
            for future in self._in_flight[0]:
                self._hear(future)
            self._in_flight.popleft()

    def become_forked(self) -> None:
        """Refuse all calls from now on, in a process forked from the one whose stream this is."""
        self.is_forked, self._dozing = True, False
        self._lock, self._showing = threading.Lock(), threading.RLock()
        self._ended = SessionLostError(
            "a process that was forked cannot use its parent's session: start it by 'spawn', and let it connect itself"
        )


@functools.cache
def _streams() -> "weakref.WeakSet[Stream]":
    """Those of this process, which learn of it when it is forked."""
    streams: weakref.WeakSet[Stream] = weakref.WeakSet()

    def refuse() -> None:
        for stream in streams:
            stream.become_forked()

    os.register_at_fork(after_in_child=refuse)
    return streams
