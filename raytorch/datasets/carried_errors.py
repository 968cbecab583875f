"""Exceptions on their way from one process to another, each with where it was raised and what it was raised from."""

import pickle
import sys
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import cloudpickle


class Frame(NamedTuple):
    """A line of a traceback."""

    file: str
    line: int
    function: str
    module: str


class CarriedError(NamedTuple):
    """An exception as it can be sent."""

    pickled: bytes | None
    """By itself; None where it cannot be."""
    module: str
    kind: str
    message: str
    frames: list[Frame]
    """From where it was caught on."""
    cause: "CarriedError | None"
    context: "CarriedError | None"
    is_context_told: bool
    notes: list[str]

    @classmethod
    def of(cls, error: BaseException, below: str = "") -> "CarriedError":
        """An exception with the frames of its traceback, without the first ones of files in the folder ``below``."""
        return _carried(error, below, set())

    def rebuilt(self) -> BaseException:
        """The exception, with a traceback of the same files and lines.

        It is of another class, of the same name, where its own could not be sent.
        """
        error: BaseException = pickle.loads(self.pickled) if self.pickled else _stand_in(self)  # noqa: S301
        error.__cause__ = self.cause and self.cause.rebuilt()
        error.__context__ = self.context and self.context.rebuilt()
        error.__suppress_context__ = not self.is_context_told
        if self.notes:
            error.__notes__ = self.notes
        return error.with_traceback(_traceback(self.frames))


def _carried(error: BaseException, below: str, seen: set[int]) -> CarriedError:
    seen.add(id(error))

    def told(other: BaseException | None) -> CarriedError | None:
        return None if other is None or id(other) in seen else _carried(other, below, seen)

    frames = list(_frames(error))
    first = next((place for place, frame in enumerate(frames) if str(Path(frame.file).parent) != below), 0)
    return CarriedError(
        _pickled(error),
        type(error).__module__,
        type(error).__name__,
        _said(error),
        frames[first:],
        told(error.__cause__),
        told(error.__context__),
        not error.__suppress_context__,
        [str(note) for note in getattr(error, "__notes__", ())],
    )


def _frames(error: BaseException) -> Iterator[Frame]:
    for frame, line in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        yield Frame(code.co_filename, line, code.co_name, frame.f_globals.get("__name__", ""))


def _said(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # of its class's own, which may be wrong
        return "<exception str() failed>"


def _pickled(error: BaseException) -> bytes | None:
    """The exception alone, if it is the same when it is read again: some require what they do not keep.

    By value, one of a class that came here by value is of the class that it was where that came from.
    """
    for dumps in (pickle.dumps, cloudpickle.dumps):
        with suppress(Exception):
            content: bytes = dumps(error)
            same = pickle.loads(content)  # noqa: S301 (of this very process)
            if type(same) is type(error) and _said(same) == _said(error):
                return content
    return None


def _stand_in(error: CarriedError) -> BaseException:
    return type(error.kind, (RuntimeError,), {"__module__": error.module})(error.message)  # type: ignore[no-any-return]


def _traceback(frames: list[Frame]) -> TracebackType | None:
    """A traceback of frames in which nothing runs, each at its file and line."""
    there: TracebackType | None = None
    for frame in reversed(frames):
        there = TracebackType(there, _frame_at(frame), -1, frame.line)  # -1: at no instruction of those that stand in
    return there


def _frame_at(place: Frame) -> FrameType:
    code = compile("frame = current()", place.file, "exec").replace(co_name=place.function, co_qualname=place.function)
    loader = getattr(sys.modules.get(place.module), "__loader__", None)
    names: dict[str, Any] = {"current": sys._getframe, "__name__": place.module, "__loader__": loader}
    exec(code, names)  # noqa: S102 (the line above)
    found: FrameType = names.pop("frame")
    return found
