"""Turns calls into instructions: takes arguments apart, and knows what kind of result to expect."""

import functools
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from types import CodeType, FrameType
from typing import Any, NamedTuple, TypeVar

import torch

from raytorch.errors import RemoteOpError, SessionError
from raytorch.session import function_names, worker_functions
from raytorch.session.arguments import VALUES, Arguments, BoundedCache, CallStructure, Function, known
from raytorch.session.handles import HANDLES_PER_CLIENT, Reference
from raytorch.session.instruction_stream import Parts, Stream, Transport
from raytorch.session.interception import intercept
from raytorch.session.program import NOWHERE, Leaf, Modes, Pattern, Report, ResultKind
from raytorch.session.registry import HandleKind
from raytorch.session.remote_objects import RemoteObject, stand_in
from raytorch.session.remote_tensor import RemoteTensor
from raytorch.session.result_structure import Description, count_held, is_tensor, rebuild

R = TypeVar("R", bound=Reference)


class _Plan(NamedTuple):
    """How to record a call as the last one from the same place."""

    pattern: Pattern
    modes: Modes
    kinds: tuple[type[Any], ...]
    references: tuple[int, ...]
    """The places of those arguments that are handles."""
    code: CodeType
    """The client's, kept so that its id, by which the plan is found, is not given out again."""


class Recorder:
    """Records the calls of one client of a session, by its number; the first is 0."""

    def __init__(self, transport: Transport, *, client: int = 0) -> None:
        self.stream = Stream(transport, client)
        self.changes = 0
        """How often something was done by which objects may give results of another structure from then on."""
        intercept()
        self._handles = itertools.count(client * HANDLES_PER_CLIENT + 1)
        self._expected: BoundedCache[CallStructure, Any] = BoundedCache()
        self._plans: BoundedCache[Any, _Plan] = BoundedCache()
        self._patterns: BoundedCache[Any, tuple[Pattern, CodeType]] = BoundedCache()
        """With the client's code, whose id is in the key."""

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
        Raises RemoteOpError (a value was asked for, and this call or an earlier one failed), SessionLostError.
        """
        if not kwargs and rank is None and (repeated := self._repeat(function, args)) is not None:
            return repeated
        kwargs = kwargs or {}
        arguments = Arguments(self, function, args, kwargs, rank, is_learned=True, has_graph=True)
        called = arguments.structure.function
        if called.in_place:
            return self._call_in_place(arguments, args or list(kwargs.values()))
        if kwargs.get("out") is not None:
            return self._call_into(kwargs["out"], arguments)
        # What a call of an object gives depends on the object.
        results = args[0].expected() if called.on_object and isinstance(args[0], RemoteObject) else self._expected
        expected = results.get(arguments.structure)
        match expected:
            case None | ResultKind.ANSWER:
                return self._ask_and_learn(arguments, results)
            case ResultKind.DROP:
                return self._record(arguments, ResultKind.DROP, NOWHERE)
            case ResultKind.TENSOR:
                tensor = RemoteTensor(self, next(self._handles), arguments.rank)
                self._record(arguments, ResultKind.TENSOR, tensor._handle)
                self._plan(function, args, arguments)
                return tensor
        kind, count = expected
        tensors = [RemoteTensor(self, handle, arguments.rank) for handle in itertools.islice(self._handles, count)]
        self._record(arguments, ResultKind.TENSORS, tuple([tensor._handle for tensor in tensors]))
        return kind(tensors)

    def keep(
        self, remote: type[R], function: Callable[..., Any], *args: Any, rank: int | None = None, **kwargs: Any
    ) -> R:
        """Record a call whose result, of a known kind, stays on the workers; waits for nothing."""
        arguments = Arguments(self, function, args, kwargs, rank)
        held = remote(self, next(self._handles), arguments.rank)
        self._record(arguments, ResultKind.KEEP, held._handle)
        return held

    def do(self, function: Callable[..., Any], *args: Any, rank: int | None = None, **kwargs: Any) -> None:
        """Record a call for what it does; waits for nothing."""
        self._record(Arguments(self, function, args, kwargs, rank), ResultKind.DROP, NOWHERE)

    def ask(self, function: Callable[..., Any], *args: Any, rank: int | None = None, **kwargs: Any) -> Any:
        """Call a function and wait for its result, the lowest rank's. Raises RemoteOpError, SessionLostError."""
        return self._ask_and_tell(Arguments(self, function, args, kwargs, rank))

    def run(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], rank: int | None
    ) -> Any:
        """Call a function of the user's, as :meth:`ask` does. Raises SessionError too: a local tensor requires grad."""
        self.changes += any(isinstance(value, RemoteObject) for value in (*args, *kwargs.values()))
        return self._ask_and_tell(
            Arguments(self, worker_functions.call, (function, *args), kwargs, rank, has_graph=True)
        )

    def ask_all(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """As :meth:`ask`, on every rank that has the arguments; the results are plain values."""
        arguments = Arguments(self, function, args, kwargs, None)
        everywhere = range(self.stream.transport.world_size)
        pattern = self._pattern(arguments.structure, arguments.rank, ResultKind.ANSWER)
        ranks = everywhere if arguments.rank is None else [arguments.rank]
        reports = self.stream.ask(pattern, NOWHERE, arguments.leaves, ranks)
        for report in reports:
            self._raise(report, NOWHERE)
        return [rebuild(report.answer, _refuse_held) for report in reports]

    def upload(self, parts: Parts, rank: int | None = None) -> RemoteTensor:
        """Record that a tensor is made of the client's data: one payload for all ranks, for ``rank``, or for each."""
        if rank is not None:
            parts = [parts[0] if place == rank else None for place in range(self.stream.transport.world_size)]
        shape = CallStructure(known(worker_functions.upload), (Leaf.ATTACHMENT,), ())
        tensor = RemoteTensor(self, next(self._handles), rank)
        self.stream.append_upload(self._pattern(shape, rank, ResultKind.TENSOR), tensor._handle, parts)
        return tensor

    def require_every_rank(self, name: str, rank: int) -> None:
        """Refuse a call in which all ranks communicate, of what is on one of several. Raises SessionError."""
        if self.stream.transport.world_size > 1:
            raise SessionError(
                f"{name} needs every rank, and its argument is on rank {rank} alone: make that on all ranks, with the "
                "session's own methods or scatter()"
            )

    def skip_to(self, handle: int) -> None:
        """Give out no handle below this one any more."""
        self._handles = itertools.count(handle)

    def _call_in_place(self, arguments: Arguments, args: Sequence[Any]) -> Any:
        name = arguments.structure.function.name
        changed = args[0] if args else None
        parts = changed if isinstance(changed, tuple | list) else [changed]
        if any(isinstance(part, torch.Tensor) for part in parts):
            raise SessionError(f"{name} cannot change a local tensor: fetch() the remote one first")
        self._record(arguments, ResultKind.DROP, tuple([part.handle for part in parts if isinstance(part, Reference)]))
        return None if name.endswith("__setitem__") else changed

    def _call_into(self, out: Any, arguments: Arguments) -> Any:
        if isinstance(out, Reference):
            self._record(arguments, ResultKind.DROP, out.handle)
            return out
        if any(isinstance(part, torch.Tensor) for part in (out if isinstance(out, tuple | list) else [out])):
            raise SessionError(
                "out= is a local tensor, which workers cannot write to: leave it out, and fetch() the result"
            )
        return self._ask_and_learn(arguments, self._expected)

    def _ask_and_learn(self, arguments: Arguments, results: BoundedCache[CallStructure, Any]) -> Any:
        shape = arguments.structure
        handle, report = self._ask(arguments)
        if report.failure:
            is_told_here = not report.failure.operation  # it is the answer that could not be read
            if shape.function.gives_value or results.get(shape) or is_told_here:
                self._raise(report, handle)
            return RemoteTensor(self, handle, arguments.rank)  # raises when its value is asked for
        answer: Description = report.answer
        if shape.function.learnable and not arguments.has_code:
            results[shape] = _expectation(answer, shape.function)
        if not count_held(answer):
            self._raise(report, handle)
        return self._rebuild(answer, handle, arguments.rank)

    def _ask_and_tell(self, arguments: Arguments) -> Any:
        handle, report = self._ask(arguments)
        self._raise(report, handle)
        return self._rebuild(report.answer, handle, arguments.rank)

    def _ask(self, arguments: Arguments) -> tuple[int, Report]:
        """Ask the lowest rank that has the arguments for a result, which it keeps under the handle."""
        handle = next(self._handles)
        pattern = self._pattern(arguments.structure, arguments.rank, ResultKind.ANSWER)
        try:
            (report,) = self.stream.ask(pattern, handle, arguments.leaves, [arguments.rank or 0])
        except KeyboardInterrupt:
            self.stream.freed.append(handle)
            raise
        return handle, report

    def _plan(self, function: Callable[..., Any], args: Sequence[Any], arguments: Arguments) -> None:
        """Remember how a call that gives a tensor was recorded, if it depends on handles and numbers alone."""
        shape = arguments.structure
        flat = not shape.kwargs and all(isinstance(arg, Reference) or type(arg) in VALUES for arg in args)
        if flat and arguments.rank is None and not shape.function.on_object:
            pattern = self._pattern(shape, None, ResultKind.TENSOR)
            kinds = tuple(map(type, args))
            references = tuple([place for place, arg in enumerate(args) if isinstance(arg, Reference)])
            self._plans[_site(function)] = _Plan(pattern, Modes.current(), kinds, references, own_frame().f_code)

    def _repeat(self, function: Callable[..., Any], args: Sequence[Any]) -> Any:
        """Record a call as the last one from the same place was recorded; None if it may be of another shape."""
        plan = self._plans.get(_site(function))
        if plan is None or tuple(map(type, args)) != plan.kinds or Modes.current() != plan.modes:
            return None
        leaves = list(args)
        for place in plan.references:
            reference = args[place]
            if reference._recorder is not self or reference._rank is not None:
                return None
            leaves[place] = reference._handle
        tensor = RemoteTensor(self, next(self._handles))  # first: should Ctrl-C come in between, it is freed
        self.stream.append(plan.pattern, tensor._handle, leaves)
        return tensor

    def _record(self, arguments: Arguments, result: ResultKind, output: Any) -> None:
        self.stream.append(self._pattern(arguments.structure, arguments.rank, result), output, arguments.leaves)

    def _pattern(self, shape: CallStructure, rank: int | None, result: ResultKind) -> Pattern:
        """The pattern of a call from the client's own line."""
        modes = Modes.current()
        frame = own_frame()
        code = frame.f_code
        key = (shape, rank, result, modes, id(code), frame.f_lasti)
        known = self._patterns.get(key)
        if known:
            return known[0]
        name, args, kwargs = shape.function.name, shape.args, shape.kwargs
        if rank is not None and function_names.is_collective(name):
            self.require_every_rank(name, rank)
        pattern = Pattern(name, args, kwargs, result, modes, rank, code.co_filename, frame.f_lineno or 0)
        self._patterns[key] = pattern, code
        return pattern

    def _raise(self, report: Report, handle: int) -> None:
        """Raise the call's error, or one that nobody was told of; what the call left on a worker is freed then."""
        try:
            if report.failure:
                self.stream.untold.mark_reported(report.failure)
                raise copy(report.failure)  # the report stays in the traceback's frames: no cycle is to keep handles
            self.stream.raise_error()
        except RemoteOpError:
            self.stream.freed.append(handle)
            self.changes += 1  # an object may have given something else than was expected: ask it again
            raise

    def _rebuild(self, answer: Description, handle: int, rank: int | None) -> Any:
        if not count_held(answer):
            self.stream.freed.append(handle)  # a rank that was not asked may have failed, or hold a result
            return rebuild(answer, _refuse_held)
        if answer[0] == "held":
            return stand_in(answer[1])(self, handle, rank)
        whole = Reference(self, handle, rank)
        handles = tuple(itertools.islice(self._handles, count_held(answer)))
        self._record(Arguments(self, worker_functions.unpack, [whole], {}, rank), ResultKind.TENSORS, handles)
        taken = iter(handles)
        return rebuild(answer, lambda kind: stand_in(kind)(self, next(taken), rank))


def own_frame(above: int = 1) -> FrameType:
    """The client's frame: the first outside of PyTorch and raytorch, at least that many frames above this one."""
    frame = sys._getframe(above)
    while frame.f_back and _is_own(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
    return frame


@functools.cache
def _is_own(module: str) -> bool:
    return module.partition(".")[0] in ("raytorch", "torch")


def _site(function: Callable[..., Any]) -> tuple[Callable[..., Any], int, int]:
    """A call's place in the client's code; cheaper than its line, which Python would have to look up.

    For functions that :meth:`Recorder.call` calls, which need not be looked at, nor this one.
    """
    frame = own_frame(4)
    return function, id(frame.f_code), frame.f_lasti


def _expectation(answer: Description, function: Function) -> Any:
    """Predict what the next call of the same shape will give, as far as one can know."""
    if is_tensor(answer):
        return ResultKind.TENSOR
    if answer[0] == "value" and answer[1] is None and not function.on_object:  # an object may have a result later
        return ResultKind.DROP
    match answer:
        case ("sequence", kind, parts) if kind.__module__ == "torch.return_types" and all(map(is_tensor, parts)):
            return kind, len(parts)  # a named tuple of PyTorch's, whose length is fixed
    return ResultKind.ANSWER


def _refuse_held(kind: HandleKind) -> Any:
    raise SessionError(f"the result holds a {kind}, which cannot leave the worker")
