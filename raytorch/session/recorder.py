"""Turns calls into instructions: takes arguments apart, and knows what kind of result to expect."""

import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any, NamedTuple

import cloudpickle
import numpy as np
import torch

from raytorch.errors import HandleError, RemoteOpError, SessionError
from raytorch.registry import Kind
from raytorch.session import functions, primitives
from raytorch.session.program import ATTACHMENT, CODE, HANDLE, NOWHERE, VALUE, Modes, Pattern, Report, Result, Template
from raytorch.session.results import Description, count_held, fixed_tensors, is_tensor, rebuild
from raytorch.session.stream import Parts, Stream, Transport
from raytorch.session.transfer import Payload

HANDLES_PER_CLIENT = 1 << 40

_VALUES = {int, float, complex}
_CONSTANTS = {type(None), bool, str, type(...), torch.dtype, torch.device, torch.layout, torch.memory_format}
_ASKED_EACH_TIME = {"torch.Tensor.grad.__get__", "torch.Tensor.grad_fn.__get__"}
"""Their result may be None now and a tensor later."""
_OWN_PACKAGES = {"raytorch", "torch"}


class Reference:
    """Stands on the client for a value on the workers, which is freed when the reference is collected."""

    __slots__ = ("__weakref__", "_handle", "_rank", "_recorder")

    def __init__(self, recorder: "Recorder", handle: int, rank: int | None = None) -> None:
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
class _Function:
    """What the client knows of a function."""

    name: str
    in_place: bool
    learnable: bool
    gives_value: bool
    on_object: bool


class Shape(NamedTuple):
    """A call without its leaves."""

    function: _Function
    args: tuple[Template, ...]
    kwargs: tuple[tuple[str, Template], ...]


class Recorder:
    """Records the calls of one client of a session.

    Args:
        transport: The way to the workers.
        stand_in: Makes the client's object for a value of some kind on the workers.
        client: The client's number in the session; the first is 0.
    """

    def __init__(
        self, transport: Transport, stand_in: Callable[["Recorder", Kind, int, int | None], Any], *, client: int = 0
    ) -> None:
        self.stream = Stream(transport, client)
        self.stand_in = stand_in
        self._handles = itertools.count(client * HANDLES_PER_CLIENT + 1)
        self._functions: dict[Callable[..., Any], _Function] = {}
        self._learned: dict[Shape, Any] = {}
        self._codes: dict[int, CodeType] = {}  # kept, so that the ids in the patterns' keys are not given out again

    def call(
        self,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None = None,
        *,
        rank: int | None = None,
    ) -> Any:
        """Record a call of a PyTorch function; waits only for what is not a tensor.

        The first call of a function with arguments of some structure waits too, as nothing is known of its result.

        Returns:
            A stand-in for a tensor, a sequence of them, or the value if it can leave the worker.

        Raises:
            RemoteOpError: A value was asked for, and this call or an earlier one failed.
            SessionLostError: The session has ended.
        """
        arguments = Arguments(self, rank)
        shape = arguments.shape(self._known(function), args, kwargs or {})
        if shape.function.in_place:
            return self._call_in_place(shape, arguments, args or list((kwargs or {}).values()))
        out = kwargs.get("out") if kwargs else None
        if isinstance(out, torch.Tensor):
            raise SessionError(
                "out= is a local tensor, which workers cannot write to: leave it out, and fetch() the result"
            )
        if isinstance(out, Reference):
            self._record(shape, arguments, Result.TENSOR, out.handle)
            return out
        learned = self._learned.get(arguments.subject(shape))
        if learned is Result.TENSOR:
            handle = next(self._handles)
            self._record(shape, arguments, Result.TENSOR, handle)
            return self.stand_in(self, Kind.TENSOR, handle, arguments.rank)
        if learned is Result.DROP:
            return self._record(shape, arguments, Result.DROP, NOWHERE)
        if learned is None or learned is Result.ANSWER:
            return self._ask_and_learn(shape, arguments)
        kind, count = learned
        handles = tuple(itertools.islice(self._handles, count))
        self._record(shape, arguments, Result.TENSORS, handles)
        return kind([self.stand_in(self, Kind.TENSOR, handle, arguments.rank) for handle in handles])

    def keep(self, kind: Kind, function: Callable[..., Any], *args: Any, rank: int | None = None, **kwargs: Any) -> Any:
        """Record a call whose result, of a known kind, stays on the workers; waits for nothing."""
        arguments = Arguments(self, rank)
        shape = arguments.shape(self._known(function), args, kwargs)
        handle = next(self._handles)
        self._record(shape, arguments, Result.KEEP, handle)
        return self.stand_in(self, kind, handle, arguments.rank)

    def do(self, function: Callable[..., Any], *args: Any, rank: int | None = None, **kwargs: Any) -> None:
        """Record a call for what it does; waits for nothing."""
        arguments = Arguments(self, rank)
        self._record(arguments.shape(self._known(function), args, kwargs), arguments, Result.DROP, NOWHERE)

    def ask(self, function: Callable[..., Any], *args: Any, rank: int | None = None, **kwargs: Any) -> Any:
        """Call a function and wait for its result; that of the lowest rank where several have one.

        Raises:
            RemoteOpError: This call or an earlier one failed.
            SessionLostError: The session has ended.
        """
        arguments = Arguments(self, rank)
        shape = arguments.shape(self._known(function), args, kwargs)
        handle, (report,) = self._ask(shape, arguments, [arguments.rank or 0])
        self._raise(report, handle)
        return self._rebuild(report.answer, handle, arguments.rank)

    def ask_all(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Call a function on every rank that has the arguments, and wait for the results, which are plain values.

        Raises:
            RemoteOpError: This call or an earlier one failed.
            SessionLostError: The session has ended.
        """
        arguments = Arguments(self, None)
        shape = arguments.shape(self._known(function), args, kwargs)
        everywhere = range(self.stream.transport.world_size)
        number = self._pattern(shape, arguments.rank, Result.ANSWER)
        ranks = everywhere if arguments.rank is None else [arguments.rank]
        reports = self.stream.ask((number, NOWHERE, *arguments.leaves), ranks)
        for report in reports:
            self._raise(report, NOWHERE)
        return [rebuild(report.answer, _refuse_held) for report in reports]

    def upload(self, parts: Parts, rank: int | None = None) -> Any:
        """Record that a tensor is made of the client's data: one payload for all ranks, for ``rank``, or for each."""
        if rank is not None:
            parts = [parts[0] if place == rank else None for place in range(self.stream.transport.world_size)]
        shape = Shape(self._known(primitives.upload), (ATTACHMENT,), ())
        handle = next(self._handles)
        self.stream.append_upload(self._pattern(shape, rank, Result.TENSOR), handle, parts)
        return self.stand_in(self, Kind.TENSOR, handle, rank)

    def skip_to(self, handle: int) -> None:
        """Give out no handle below this one any more."""
        self._handles = itertools.count(handle)

    def _known(self, function: Callable[..., Any]) -> _Function:
        known = self._functions.get(function)
        if known is None:
            name = functions.name_of(function)
            known = _Function(
                name,
                functions.changes_first_argument(name),
                name not in _ASKED_EACH_TIME,
                functions.gives_value(name),
                function in (primitives.call, primitives.method),
            )
            self._functions[function] = known
        return known

    def _call_in_place(self, shape: Shape, arguments: "Arguments", args: Sequence[Any]) -> Any:
        changed = args[0] if args else None
        if isinstance(changed, torch.Tensor):
            raise SessionError(f"{shape.function.name} cannot change a local tensor: fetch() the remote one first")
        output = changed.handle if isinstance(changed, Reference) else _handles_in(changed)
        self._record(shape, arguments, Result.DROP, output)
        return None if shape.function.name.endswith("__setitem__") else changed

    def _ask_and_learn(self, shape: Shape, arguments: "Arguments") -> Any:
        handle, (report,) = self._ask(shape, arguments, [arguments.rank or 0])
        if report.failure:
            if shape.function.gives_value or self._learned.get(arguments.subject(shape)):
                self._raise(report, handle)
            return self.stand_in(self, Kind.TENSOR, handle, arguments.rank)  # raises when its value is asked for
        answer: Description = report.answer
        if shape.function.learnable and not arguments.has_code:
            self._learned[arguments.subject(shape)] = _expectation(answer)
        if not count_held(answer):
            self._raise(report, handle)
        return self._rebuild(answer, handle, arguments.rank)

    def _ask(self, shape: Shape, arguments: "Arguments", ranks: Sequence[int]) -> tuple[int, list[Report]]:
        handle = next(self._handles)
        number = self._pattern(shape, arguments.rank, Result.ANSWER)
        return handle, self.stream.ask((number, handle, *arguments.leaves), ranks)

    def _record(self, shape: Shape, arguments: "Arguments", result: Result, output: Any) -> None:
        self.stream.append((self._pattern(shape, arguments.rank, result), output, *arguments.leaves))

    def _pattern(self, shape: Shape, rank: int | None, result: Result) -> int:
        """The number of the pattern of a call from the client's own line."""
        modes = Modes.current()
        frame = own_frame()
        code = frame.f_code

        def make(number: int) -> Pattern:
            self._codes[id(code)] = code
            name, args, kwargs = shape.function.name, shape.args, shape.kwargs
            return Pattern(number, name, args, kwargs, result, modes, rank, code.co_filename, frame.f_lineno or 0)

        return self.stream.pattern((shape, rank, result, modes, id(code), frame.f_lasti), make)

    def _raise(self, report: Report, handle: int) -> None:
        """Raise the call's error, or one that nobody was told of; what the call left on a worker is freed then."""
        try:
            if report.failure:
                self.stream.was_raised(report.failure)
                raise report.failure
            self.stream.raise_error()
        except RemoteOpError:
            self.stream.freed.append(handle)
            raise

    def _rebuild(self, answer: Description, handle: int, rank: int | None) -> Any:
        if not count_held(answer):
            self.stream.freed.append(handle)  # a rank that was not asked may have failed, or hold a result
            return rebuild(answer, _refuse_held)
        if answer[0] == "held":
            return self.stand_in(self, answer[1], handle, rank)
        whole = Reference(self, handle, rank)
        handles = tuple(itertools.islice(self._handles, count_held(answer)))
        arguments = Arguments(self, rank)
        shape = arguments.shape(self._known(primitives.unpack), [whole], {})
        self._record(shape, arguments, Result.TENSORS, handles)
        taken = iter(handles)
        return rebuild(answer, lambda kind: self.stand_in(self, kind, next(taken), rank))


class Arguments:
    """The arguments of a call, taken apart into templates and leaves."""

    __slots__ = ("_recorder", "_uploaded", "has_code", "leaves", "rank")

    def __init__(self, recorder: Recorder, rank: int | None) -> None:
        self._recorder = recorder
        self._uploaded: list[Reference] = []  # kept until the call is recorded
        self.leaves: list[Any] = []
        self.has_code = False
        self.rank = rank
        """The only rank that has the arguments; None if all have them."""

    def shape(self, function: _Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Shape:
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
        if kind in _VALUES:
            self.leaves.append(value)
            return VALUE
        if kind in _CONSTANTS:
            return ("constant", kind, value)
        if kind is slice:
            return self._sequence(kind, (value.start, value.stop, value.step))
        if isinstance(value, tuple | list):
            return self._sequence(kind, value)
        if kind is dict:
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


def own_frame() -> FrameType:
    """The client's frame: the first outside of PyTorch and raytorch."""
    frame = sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _OWN_PACKAGES:
        frame = frame.f_back
    return frame


def _expectation(answer: Description) -> Any:
    """What the next call of the same shape will give, as far as one can know."""
    if is_tensor(answer):
        return Result.TENSOR
    if answer == ("value", None):
        return Result.DROP
    return fixed_tensors(answer) or Result.ANSWER


def _handles_in(value: Any) -> tuple[int, ...]:
    """The handles of a list that a function changes in place."""
    parts = value if isinstance(value, tuple | list) else ()
    return tuple([part.handle for part in parts if isinstance(part, Reference)])


def _refuse_held(kind: Kind) -> Any:
    raise SessionError(f"the result holds a {kind}, which cannot leave the worker")
