"""Errors that no caller was told of yet, each kept for the thread that recorded what failed."""

import threading
from bisect import bisect_right
from collections.abc import Sequence

from raytorch.errors import RemoteOpError

PROGRAMS_KEPT = 1000
"""Programs whose threads are remembered; an error of an earlier one is told to whoever asks next."""

Turn = tuple[int, int]
"""The place in a program from which on a thread recorded, and the thread."""


class UnreportedErrors:
    """Those of one client's instructions, by program and place: the same on every rank, so that each is told once."""

    def __init__(self) -> None:
        self._errors: dict[tuple[int, int], RemoteOpError] = {}
        self._told: set[tuple[int, int]] = set()
        self._turns: dict[int, Sequence[Turn]] = {}

    def __bool__(self) -> bool:
        return bool(self._errors)

    def expect(self, program: int, turns: Sequence[Turn]) -> None:
        """Note which threads recorded a program that is sent."""
        self._turns[program] = turns
        self._turns.pop(program - PROGRAMS_KEPT, None)

    def note(self, error: RemoteOpError) -> None:
        """Keep an error, unless it was told already."""
        if error.instruction not in self._told:
            self._errors.setdefault(error.instruction, error)

    def mark_reported(self, error: RemoteOpError) -> None:
        """Note that a caller is told of an error, for it not to be told for other ranks again."""
        self._told.add(error.instruction)

    def take(self, *, of_any_thread: bool) -> RemoteOpError | None:
        """The first error that this thread is to be told of: its own, or one of a thread that has ended."""
        others = (
            set() if of_any_thread else {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
        )
        for instruction in sorted(self._errors):
            if instruction in self._told:
                del self._errors[instruction]
            elif self._recorder_of(*instruction) not in others:
                self._told.add(instruction)
                return self._errors.pop(instruction)
        return None

    def _recorder_of(self, program: int, place: int) -> int | None:
        """The thread that recorded an instruction; None if that is forgotten."""
        turns = self._turns.get(program)
        return turns[bisect_right(turns, place, key=lambda turn: turn[0]) - 1][1] if turns else None
