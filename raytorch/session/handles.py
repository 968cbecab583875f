"""Handles on the client: what stands for a value on the workers, which is freed when its Python object dies."""

from collections.abc import Iterable
from typing import Any, TypeVar

from raytorch.errors import SessionError

T = TypeVar("T")

HANDLES_PER_CLIENT = 1 << 40


class Reference:
    """Stands on the client for a value on the workers, which is freed when the reference is collected.

    ``recorder`` is the :class:`~raytorch.session.recorder.Recorder` that gave it its handle.
    """

    __slots__ = ("__weakref__", "_handle", "_rank", "_recorder")

    def __init__(self, recorder: Any, handle: int, rank: int | None = None) -> None:
        self._recorder, self._handle, self._rank = recorder, handle, rank

    def __del__(self) -> None:
        self._recorder.stream.freed.append(self._handle)  # takes no lock: this may run in the midst of anything

    def __reduce__(self) -> Any:
        raise SessionError("a handle cannot be pickled: pass it on its own, or in a list, tuple or dictionary")

    def __repr__(self) -> str:
        rank = "" if self._rank is None else f", rank={self._rank}"
        return f"{type(self).__name__}(handle={self._handle}{rank})"

    @property
    def handle(self) -> int:
        """The integer that names the value on the workers."""
        return self._handle

    def free(self) -> None:
        """Free the value now, on every worker; the handle names nothing from then on."""
        self._recorder.stream.free(self._handle)


def first_of(kind: type[T], values: Iterable[Any]) -> T | None:
    """The first of a type among values, and in the lists, tuples and dictionaries among them."""
    for value in values:
        if isinstance(value, kind):
            return value
        if isinstance(value, tuple | list | dict):
            found = first_of(kind, value.values() if isinstance(value, dict) else value)
            if found is not None:
                return found
    return None
