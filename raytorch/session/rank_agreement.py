"""Agreement of the ranks of a session: what they tell each other before they communicate, and when one of them cannot.

An instruction that every rank executes, and in which ranks may communicate, is a *joint call*; the ranks number theirs
alike, as all of them take the programs in one order. Before they communicate they agree, through the store where they
met: each leaves its record for the others and takes theirs. A rank that cannot take part leaves a record that says so,
waits for nobody, and keeps its error where the others find it; the first error of a joint call is that of all ranks.

A rank that fails once others may already wait for it in the process group closes its part of that, which ends their
waiting. With the next agreement all of them join a new group.
"""

import json
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

from raytorch.distributed.process_group import RenewableGroup
from raytorch.errors import Cause, RemoteOpError, SessionError, UserError

_LAST = 1 << 62
"""Place in a joint call after all of its agreements."""
_FAILED, _ENDED = "failed", "ended"


class CannotRun(Exception):  # noqa: N818 - a signal
    """A call cannot be made: an argument is what a failed operation did not give, or another rank fails in it.

    ``others`` has the error again if it is another rank's, which this one is to tell of too.
    """

    def __init__(self, error: RemoteOpError, *others: RemoteOpError) -> None:
        super().__init__(error)
        self.others = others


class _Announcement(NamedTuple):
    """Announcement of a rank to the others."""

    call: int
    """Number of the joint call."""
    turn: int
    """Place in it: 0 for the first agreement, 1 for the next."""
    what: str
    """Action that it is about to take; or that it has failed, or is through."""
    group: int
    """Number of the process group that it needs."""
    origin: list[int]
    """The client that recorded the call, and the number of its program and the place in that."""

    @property
    def place(self) -> tuple[int, int]:
        """Comes later for what is done later."""
        return self.call, self.turn


class Peers:
    """This rank's way to the others. Used by the one thread that executes programs.

    ``store`` is a connection to the ranks' store that nobody else uses; a rank waits ``timeout_s`` for the others.
    """

    def __init__(self, store: Any, *, rank: int, world_size: int, group: RenewableGroup, timeout_s: float) -> None:
        self._store, self._rank, self._group, self._timeout_s = store, rank, group, timeout_s
        store.set_timeout(timedelta(seconds=timeout_s))
        self._others = [other for other in range(world_size) if other != rank]
        self._early: dict[int, _Announcement] = {}
        """By rank, a record of later than was asked for."""
        self._kept: list[str] = []
        """Keys of errors in the store that are this rank's to delete."""
        self._number = 0
        self._wanted = 0
        """Number of the process group in use, and of the one that this rank needs."""
        self._call, self._turn, self._origin = 0, 0, [0, 0, 0]
        self._is_joint = False
        self._is_whole = False
        self.world_size = world_size
        """Number of ranks."""
        self.averages_gradients = False
        """True if a backward pass may communicate."""

    @property
    def has_left(self) -> bool:
        """True if this rank has left the process group, and not joined another yet."""
        return self._wanted != self._number

    @contextmanager
    def joint_call(self, *origin: int) -> Iterator[None]:
        """A joint call is executed in the block."""
        self._call += 1
        self._turn, self._origin = 0, list(origin)
        self._is_joint, self._is_whole = True, False
        try:
            yield
            if self._turn and not self._is_whole:
                self._tell(_ENDED, _LAST)
        finally:
            self._is_joint = False

    def run(
        self,
        origin: tuple[int, int, int],
        call: Callable[[], None],
        described: Callable[[BaseException], RemoteOpError],
    ) -> None:
        """Make a joint call; if it fails on a rank it does on all of them, with the error of the first.

        ``described`` gives what to tell of an error. Raises CannotRun: an argument has failed, or another rank before.
        """
        try:
            with self.joint_call(*origin):
                call()
        except CannotRun as signal:
            self._fail_with(signal.args[0])
            raise
        except BaseException as error:
            failure = described(error)
            if self._is_whole and isinstance(error, UserError):
                self._turn = 0  # the collective refuses what all ranks alike have given it, before it begins
            traceback.clear_frames(error.__traceback__)  # they may hold what keeps the process group's connections
            self._fail_with(failure)
            raise

    def _fail_with(self, failure: RemoteOpError) -> None:
        if (first := self.fail(failure)) is not failure:
            raise CannotRun(first, first) from None

    def agree(self, what: str, *, is_whole: bool = False) -> None:
        """Wait until all ranks are here, about to do the same, in a process group that all of them are in.

        With ``is_whole`` this covers all that the joint call does, the agreement of a collective included. Raises
        RemoteOpError, another rank's; SessionError: another rank does not take part, or this one is not in a joint
        call; UserError: the ranks are about to do different things.
        """
        if not self._is_joint:
            raise SessionError(f"{what} needs every rank, and this call is executed on rank {self._rank} alone")
        if self._is_whole:
            return
        own = self._tell(what, self._turn)
        records = {other: self._record_of(other, own) for other in self._others}
        self._require_agreement(own, {self._rank: own, **records})
        self._turn += 1
        self._is_whole = is_whole
        while self._kept:  # errors of earlier calls: all ranks are past them
            self._store.delete_key(self._kept.pop())
        self._wanted = max(own.group, *[record.group for record in records.values()])
        if self._wanted != self._number:
            self._group.renew(self._wanted)
            self._number = self._wanted

    def fail(self, failure: RemoteOpError) -> RemoteOpError:
        """Tell the others that this rank cannot go on with the joint call; answers with the first error of a rank."""
        key = f"error {self._call}"
        own = _packed(failure)
        try:
            told = self._store.compare_set(key, "", own)
            self._tell(_FAILED, _LAST)
        except RuntimeError:  # the session is ending
            return failure
        if self._turn and self._group.leave():
            self._wanted = self._number + 1
        if told != own.encode():
            return _unpacked(told)
        self._kept.append(key)
        return failure

    def _tell(self, what: str, turn: int) -> _Announcement:
        record = _Announcement(self._call, turn, what, self._wanted, self._origin)
        packed = json.dumps(record)
        for other in self._others:
            self._store.queue_push(f"{self._rank} to {other}", packed)
        return record

    def _record_of(self, other: int, own: _Announcement) -> _Announcement:
        """Read what another rank says of this place, or of the next one after it that it has come to."""
        while True:
            record = self._early.pop(other, None) or self._next_of(other, own)
            if record.place > own.place:
                self._early[other] = record
            if record.place >= own.place:
                return record

    def _next_of(self, other: int, own: _Announcement) -> _Announcement:
        try:
            return _Announcement(*json.loads(self._store.queue_pop(f"{other} to {self._rank}")))
        except dist.DistStoreError:
            raise dist.DistStoreError(
                f"timed out: rank {other} has not come within {self._timeout_s:g} s to where rank {self._rank} waits "
                f"for it, in {own.what}"
            ) from None

    def _require_agreement(self, own: _Announcement, records: dict[int, _Announcement]) -> None:
        if any(record.call == own.call and record.what == _FAILED for record in records.values()):
            raise _unpacked(self._store.get(f"error {own.call}"))
        if gone := [f"rank {rank}" for rank, record in records.items() if record.place != own.place]:
            raise SessionError(f"{own.what} needs every rank, and {', '.join(gone)} went on without it")
        if len({record.what for record in records.values()}) > 1:
            told = [f"rank {rank}: {record.what}" for rank, record in sorted(records.items())]
            raise UserError(f"the workers disagree: {', '.join(told)}")
        if len({tuple(record.origin) for record in records.values()}) > 1:
            told = [f"rank {rank}: {record.origin}" for rank, record in sorted(records.items())]
            raise SessionError(
                f"the workers are not at the same instruction: {', '.join(told)} (client, program, place)"
            )


def _packed(failure: RemoteOpError) -> str:
    fields = [str(failure), failure.operation, failure.rank, failure.file, failure.line, failure.instruction]
    return json.dumps([*fields, failure.cause])


def _unpacked(packed: bytes) -> RemoteOpError:
    text, operation, rank, file, line, instruction, cause = json.loads(packed)
    failure = RemoteOpError(text)
    failure.operation, failure.rank, failure.file, failure.line = operation, rank, file, line
    failure.instruction, failure.cause = tuple(instruction), Cause(cause)
    return failure
