"""Runs the programs of a session's clients on one worker, beside its registry. Knows nothing of Ray."""

import contextlib
import functools
import operator
import pickle
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from raytorch.distributed import failure_cause
from raytorch.distributed.ddp import may_communicate
from raytorch.errors import Cause, QuotaError, RaytorchError, RemoteOpError, SessionError
from raytorch.session import function_names
from raytorch.session.program import NOWHERE, Instruction, Leaf, Pattern, Program, Report, ResultKind, bind
from raytorch.session.rank_agreement import CannotRun, Peers
from raytorch.session.registry import FailedValue, Registry
from raytorch.session.result_structure import describe, shapes_of
from raytorch.session.tensor_transfer import Payload, advised
from raytorch.session.worker_functions import ON_WORKER
from raytorch.session.worker_output import Printing

T = TypeVar("T")
OnLeaf = dict[str, Callable[[Any], Any]]


@dataclass
class _Client:
    """State that the interpreter keeps of one client."""

    calls: dict[int | None, "_Call"] = field(default_factory=dict)
    programs: int = 0
    """How many it has sent."""
    errors: list[RemoteOpError] = field(default_factory=list)
    """Those not reported yet."""


class Interpreter:
    """Executes instructions in order, as eager PyTorch, on one worker.

    What comes from the client or a factory is made on ``device``. There are ``peers`` if there are other ranks.
    """

    def __init__(
        self, registry: Registry, *, rank: int = 0, device: torch.device | str = "cpu", peers: Peers | None = None
    ) -> None:
        self.registry = registry
        self.peers: Any = peers
        self.client, self.program, self.place = 0, 0, 0
        """Where the instruction stands that is executed: in which program of which client, and its place in that."""
        self.rank = rank
        self.device = torch.device(device)
        self._clients: dict[int, _Client] = {}
        self._printing = Printing(rank)
        self._attachments: Sequence[Any] = ()
        self._answer: Any = None

    def execute(self, packed: bytes, attachments: Sequence[Any] = ()) -> Report:
        """Run a packed program; what a failed instruction gives has failed too, and the others go on."""
        program = Program.unpack(packed)
        state = self._clients.setdefault(program.client, _Client())
        state.programs += 1
        self.client, self.program = program.client, state.programs
        if program.forgets:
            state.calls.clear()
        for packed_pattern in program.patterns:
            pattern = Pattern.unpack(packed_pattern)
            state.calls[pattern.number] = self._ready(pattern)
        self._attachments, self._answer = attachments, None
        grad_enabled = torch.is_grad_enabled()
        try:
            with self._printing.caught():
                self._run(state, program.instructions)
        finally:
            if torch.is_grad_enabled() is not grad_enabled:
                torch.set_grad_enabled(grad_enabled)
            self._attachments = ()
        given, self._answer = self._answer, None
        errors, state.errors = tuple(state.errors), []
        if isinstance(given, RemoteOpError):
            return Report(None, given, errors, self._printing.take())
        return Report(given if self.rank in program.answer_from else None, None, errors, self._printing.take())

    def forget(self, client: int) -> None:
        """Drop what the interpreter keeps of a client that is gone; its handles are the registry's."""
        self._clients.pop(client, None)

    def _run(self, state: _Client, instructions: list[Instruction | int]) -> None:
        calls, free = state.calls, self.registry.free
        for place, instruction in enumerate(instructions):
            if isinstance(instruction, int):
                free((instruction,))
                continue
            self.place, call = place, calls[instruction[0]]
            try:
                call.run(instruction)
            except CannotRun as signal:
                state.errors.extend(signal.others)
                self._fail(call, instruction, signal.args[0])
            except BaseException as error:  # whatever a call raises is that call's: the session goes on
                failure = call.failure(instruction, error)
                state.errors.append(failure)
                self.registry.fail_overgrown(failure)
                self._fail(call, instruction, failure, outgrown=isinstance(error, QuotaError))

    def _fail(self, call: "_Call", instruction: Instruction, error: RemoteOpError, *, outgrown: bool = False) -> None:
        """Put the error in place of what a call did not give.

        What it was to change in place stays as it is, as in PyTorch, unless that has ``outgrown`` the quota.
        """
        if call.pattern.result == ResultKind.DROP and not outgrown:
            return
        output = instruction[1]
        for handle in output if isinstance(output, tuple) else [output] if output else []:
            self.registry.put(handle, FailedValue(error))
        if call.pattern.result == ResultKind.ANSWER:
            self._answer = error

    def value(self, handle: int) -> Any:
        """Return what a handle leaf stands for."""
        try:
            value = self.registry.values[handle]
        except KeyError:
            value = self.registry.get(handle)  # raises the right error
        if type(value) is FailedValue:
            raise CannotRun(value.error)
        return value

    def attachment(self, place: int) -> Any:
        """Return what an attachment leaf stands for."""
        if isinstance(attached := self._attachments[place], Exception):
            raise attached
        return attached

    def answer(self, output: int, value: Any) -> None:
        """Describe a result to the client, and keep what cannot leave the worker."""
        held: list[Any] = []
        description = describe(value, held)
        if held and output != NOWHERE:
            self.registry.put(output, value)
        self._answer = description

    def resolve(self, name: str) -> Callable[..., Any]:
        """The function of that name; what makes tensors of numbers alone makes them on this worker's device."""
        function = function_names.function_named(name)
        if name.removeprefix("torch.") in function_names.FACTORIES:
            return functools.partial(function, device=self.device)
        return functools.partial(function, self) if name in ON_WORKER else function

    def _ready(self, pattern: Pattern) -> "_Call":
        name = pattern.function
        changes = function_names.changes_first_argument(name) or function_names.may_grow(name)
        is_counted = self.registry.is_limited and changes
        if self.peers and pattern.rank is None and function_names.may_communicate(name):
            return (_CountedJointCall if is_counted else _JointCall)(pattern, self)
        return (_CountedCall if is_counted else _Call)(pattern, self)


class _Call:
    """A pattern made ready to run."""

    def __init__(self, pattern: Pattern, interpreter: Interpreter) -> None:
        self.pattern = pattern
        self._interpreter = interpreter
        self._put = interpreter.registry.put
        self._grad = pattern.modes.grad
        self._skip = pattern.rank is not None and pattern.rank != interpreter.rank
        on_leaf: OnLeaf = {
            **dict.fromkeys((Leaf.HANDLE, Leaf.COPY), interpreter.value),
            Leaf.CODE: pickle.loads,
            Leaf.ATTACHMENT: interpreter.attachment,
        }
        self._args = [bind(template, on_leaf) for template in pattern.args]
        self._flat = not pattern.kwargs and all(template in (Leaf.HANDLE, Leaf.VALUE) for template in pattern.args)
        self._handles = [place for place, template in enumerate(pattern.args) if template == Leaf.HANDLE]
        self._kwargs = [(name, bind(template, on_leaf)) for name, template in pattern.kwargs]
        is_own = pattern.function.startswith("raytorch.session.")
        self._has_copies = Leaf.COPY in pattern.templates and not is_own
        self._contexts = pattern.modes.contexts(interpreter.device.type)
        self._function: Callable[..., Any] | None = None
        self._keep = getattr(self, f"_keep_{pattern.result}")

    def run(self, instruction: Instruction) -> None:
        """Execute an instruction of this pattern."""
        if self._skip:
            return
        function = self._function
        if function is None:
            if self.pattern.error:
                raise self.pattern.error
            function = self._function = self._interpreter.resolve(self.pattern.function)
        args, kwargs = self._arguments(instruction)
        if self._has_copies:
            function = functools.partial(_leaving_copies, self.pattern, function)
        if torch.is_grad_enabled() is not self._grad:
            torch.set_grad_enabled(self._grad)
        if self._contexts:
            with contextlib.ExitStack() as stack:
                for context in self._contexts:
                    stack.enter_context(context)
                value = function(*args, **kwargs)
        else:
            value = function(*args, **kwargs)
        self._keep(instruction[1], value)

    def _arguments(self, instruction: Instruction) -> tuple[list[Any], dict[str, Any]]:
        if self._flat:
            args = list(instruction[2:])
            for place in self._handles:
                args[place] = self._interpreter.value(args[place])
            return args, {}
        leaves = iter(instruction[2:])
        args = [build(leaves) for build in self._args]
        return args, {name: build(leaves) for name, build in self._kwargs}

    def _keep_drop(self, output: int, value: Any) -> None:
        if value is NotImplemented:  # of an operator in place
            raise TypeError("unsupported type of operand")

    def _keep_tensor(self, output: int, value: Any) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(
                f"gave a {type(value).__name__} where it had given a tensor before; the next call will expect that. "
                "What gives ever other things is called with session.run(lambda net, x: net(x), net, x), which waits"
            )
        self._put(output, value)

    def _keep_keep(self, output: int, value: Any) -> None:
        self._put(output, value)

    def _keep_answer(self, output: int, value: Any) -> None:
        self._interpreter.answer(output, value)

    def _keep_tensors(self, outputs: tuple[int, ...], value: Any) -> None:
        for handle, part in zip(outputs, value, strict=True):
            self._put(handle, part)

    def failure(self, instruction: Instruction, error: BaseException) -> RemoteOpError:
        """The error for the client: what was called, with which arguments, where, and what went wrong."""
        pattern = self.pattern
        failure = RemoteOpError.describing(
            operation=pattern.function,
            arguments=self._shapes(instruction),
            rank=self._interpreter.rank,
            file=pattern.file,
            line=pattern.line,
            reason=_said(lambda: advised(error), f"{type(error).__name__} (it cannot say why)"),
            traceback="" if isinstance(error, RaytorchError) else _said(lambda: _below(error), ""),
        )
        failure.instruction = self._interpreter.program, self._interpreter.place
        failure.cause = _said(lambda: failure_cause(error), Cause.ERROR)
        return failure

    def _shapes(self, instruction: Instruction) -> str:
        return _said(lambda: self._described(instruction), "...")

    def _described(self, instruction: Instruction) -> str:
        values = self._interpreter.registry.values
        on_leaf: OnLeaf = {
            **dict.fromkeys((Leaf.HANDLE, Leaf.COPY), lambda handle: values.get(handle, f"freed handle {handle}")),
            Leaf.CODE: lambda code: _said(functools.partial(pickle.loads, code), "code"),
            Leaf.ATTACHMENT: lambda place: "data",
        }
        leaves: Iterator[Any] = iter(instruction[2:])
        args = [bind(template, on_leaf)(leaves) for template in self.pattern.args]
        kwargs = [f"{name}={shapes_of([bind(template, on_leaf)(leaves)])}" for name, template in self.pattern.kwargs]
        return ", ".join([shapes_of(args), *kwargs] if args else kwargs)


class _CountedCall(_Call):
    """A call by which what has a handle may come to hold more, or less: that is counted again, against the quota."""

    def __init__(self, pattern: Pattern, interpreter: Interpreter) -> None:
        super().__init__(pattern, interpreter)
        self._may_grow = function_names.may_grow(pattern.function)
        self._is_of_handle = pattern.args[:1] == (Leaf.HANDLE,)

    def run(self, instruction: Instruction) -> None:
        try:
            super().run(instruction)
        except BaseException:
            with contextlib.suppress(QuotaError):  # what went wrong first is told
                self._recount(instruction)
            raise
        self._recount(instruction)

    def _recount(self, instruction: Instruction) -> None:
        subject = instruction[2:3] if self._is_of_handle else ()
        self._interpreter.registry.recount(subject, and_growing=self._may_grow)


class _JointCall(_Call):
    """A call that every rank makes, and in which they may communicate: if one of them fails in it, all do."""

    def run(self, instruction: Instruction) -> None:
        interpreter = self._interpreter
        origin = interpreter.client, interpreter.program, interpreter.place
        call, failure = functools.partial(super().run, instruction), functools.partial(self.failure, instruction)
        interpreter.peers.run(origin, call, failure)

    def _arguments(self, instruction: Instruction) -> tuple[list[Any], dict[str, Any]]:
        args, kwargs = super()._arguments(instruction)
        name, peers = self.pattern.function, self._interpreter.peers
        if function_names.is_collective(name) or (function_names.is_backward(name) and peers.averages_gradients):
            peers.agree(f"{name}({self._shapes(instruction)})", is_whole=True)
        elif not function_names.is_backward(name) and may_communicate(args[0]):
            peers.agree(f"{name}({shapes_of(args[:1])})")
        return args, kwargs


class _CountedJointCall(_JointCall, _CountedCall):
    """A call that is both."""


def _said(describe: Callable[[], T], otherwise: T) -> T:
    """Return what describes an error; ``otherwise`` if that raises in its turn, which is not to hide the error."""
    try:
        return describe()
    except BaseException:  # whatever a class of the user's raises
        return otherwise


def _leaving_copies(pattern: Pattern, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function. Raises SessionError if it changes what is a copy of the client's tensor."""
    given = zip(pattern.templates, (*args, *kwargs.values()), strict=True)
    copies = [value for template, value in given if template == Leaf.COPY and not value.is_inference()]
    before = [_state(copy, pattern.function) for copy in copies]
    result = function(*args, **kwargs)
    if not all(map(operator.eq, before, [_state(copy, pattern.function) for copy in copies])):
        raise SessionError(
            "the call changes a local tensor, of which the workers have a copy: have it there, with session.tensor() "
            "or, for a layer's statistics, session.module()"
        )
    return result


def _state(tensor: Tensor, function: str) -> Any:
    """Return what differs if a function has changed the tensor."""
    if "norm" in function:  # whose statistics it changes without counting a version
        return Payload.of(tensor).array.tobytes()
    return tensor._version


def _below(error: BaseException) -> str:
    """The traceback from the first frame below this module's: the user's own function, if one was called."""
    summary = traceback.TracebackException.from_exception(error)
    frames = [frame for frame in summary.stack if frame.filename != __file__]
    return "".join(traceback.format_list(frames)).rstrip()
