"""The arguments of a call, taken apart: a template, which is the same each time, and the leaves, which are not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cloudpickle
import numpy as np
import torch

from raytorch.errors import HandleError, SessionError
from raytorch.session.program import CODE, HANDLE, VALUE, Template
from raytorch.session.transfer import Payload

VALUES = {int, float, complex}
"""Types of numbers, which travel as they are."""
_CONSTANTS = {type(None), bool, str, type(...), torch.dtype, torch.device, torch.layout, torch.memory_format}


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

    @property
    def handle(self) -> int:
        """The integer that names the value on the workers."""
        return self._handle


@dataclass(frozen=True, eq=False)
class Function:
    """What the client knows of a function."""

    name: str
    in_place: bool
    learnable: bool
    gives_value: bool
    on_object: bool


class Shape(NamedTuple):
    """A call without its leaves."""

    function: Function
    args: tuple[Template, ...]
    kwargs: tuple[tuple[str, Template], ...]


class Arguments:
    """The arguments of a call, taken apart into templates and leaves."""

    __slots__ = ("_recorder", "_uploaded", "has_code", "leaves", "rank")

    def __init__(self, recorder: Any, rank: int | None) -> None:
        self._recorder = recorder
        self._uploaded: list[Reference] = []  # kept until the call is recorded
        self.leaves: list[Any] = []
        self.has_code = False
        self.rank = rank
        """The only rank that has the arguments; None if all have them."""

    def shape(self, function: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Shape:
        """The call's shape.

        Raises:
            HandleError: An argument is of another session.
            SessionError: The arguments are on different ranks.
        """
        templates = tuple([self._template(value) for value in args])
        if not kwargs:
            return Shape(function, templates, ())
        return Shape(function, templates, tuple([(name, self._template(value)) for name, value in kwargs.items()]))

    def subject(self, shape: Shape) -> Any:
        """What the kind of result depends on: the call's shape and, for a call of an object, the object."""
        return (shape, self.leaves[0]) if shape.function.on_object else shape

    def _template(self, value: Any) -> Template:
        kind = type(value)
        if isinstance(value, Reference):
            return self._reference(value)
        if kind in VALUES:
            self.leaves.append(value)
            return VALUE
        if kind in _CONSTANTS:
            return ("constant", kind, value)
        if kind is slice:
            return self._sequence(kind, (value.start, value.stop, value.step))
        if isinstance(value, tuple | list):
            return self._sequence(kind, value)
        if kind is dict:
            _require_plain(value)
            return ("mapping", tuple(value), tuple([self._template(part) for part in value.values()]))
        if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
            self._uploaded.append(self._recorder.upload([Payload.of(value)], self.rank))
            return self._reference(self._uploaded[-1])
        return self._rare(value)

    def _rare(self, value: Any) -> Template:
        if isinstance(value, np.generic):
            self.leaves.append(value)
            return VALUE
        if isinstance(value, torch.Generator):
            raise SessionError(
                "a generator of the client's cannot draw on the workers: seed them with session.manual_seed(), or make "
                "one there with session.object(torch.Generator) and give it to a method"
            )
        self.has_code = True
        self.leaves.append(cloudpickle.dumps(value))
        return CODE

    def _sequence(self, kind: type, parts: Sequence[Any]) -> Template:
        return ("sequence", kind, tuple([self._template(part) for part in parts]))

    def _reference(self, reference: Reference) -> Template:
        if reference._recorder is not self._recorder:
            raise HandleError("a handle of another session: fetch() it there, and send it with tensor() here")
        if reference._rank is not None and reference._rank != self.rank:
            if self.rank is not None:
                raise SessionError(
                    f"the arguments are on ranks {self.rank} and {reference._rank}: fetch() one of them, and send it "
                    "to the other's rank"
                )
            self.rank = reference._rank
        self.leaves.append(reference._handle)
        return HANDLE


def _require_plain(mapping: Mapping[Any, Any]) -> None:
    """Refuse keys that are no plain values: they are part of a call's shape, which travels once."""
    for key in mapping:
        if not _is_plain(key):
            raise SessionError(f"a dictionary's key is a {type(key).__name__}: use strings or numbers as keys")


def _is_plain(key: Any) -> bool:
    if type(key) is tuple:
        return all(map(_is_plain, key))
    return type(key) in _CONSTANTS or type(key) in VALUES
