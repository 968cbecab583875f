"""Programs that travel from a client to the workers: sequences of instructions, each an instance of a pattern.

A *pattern* is one call as it stands at one place in the client's script: the function, the structure of its arguments,
and the file and line. It travels before its first instruction, and again once it was forgotten. An *instruction* is a
tuple ``(pattern number, output, leaf, leaf, ...)``: where the result goes, and the handles and plain values that the
pattern's template leaves open. Between them stand handles that are to be freed.
"""

import copyreg
import pickle
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

import torch

from raytorch.errors import RemoteOpError, SessionError
from raytorch.session.pickling import dumps
from raytorch.session.worker_output import Printed
from raytorch.training.precision import autocast

MOST_PATTERNS = 10_000
"""Patterns that a client remembers, and that its programs let the workers remember, before both forget them all."""


class Leaf:
    """Templates of arguments that each instruction has a leaf for."""

    HANDLE = "handle"
    """A handle; the leaf is the integer."""
    COPY = "copy"
    """The client's own tensor, of which a copy was sent; the leaf is the copy's handle."""
    VALUE = "value"
    """A value that travels with each instruction, as the leaf."""
    CODE = "code"
    """What only pickle can carry: a function or an object of the user's. The leaf is bytes."""
    ATTACHMENT = "attachment"
    """Data that travels beside the program; the leaf is its place there."""


Template = Any
"""One of :class:`Leaf`'s; ``("constant", type, value)``; ``("sequence", type, templates)``; or
``("mapping", template of the tuple of keys, templates)``."""

NOWHERE = 0
"""Output of an instruction whose result is not stored."""


class ResultKind(StrEnum):
    """Use of a function's result."""

    DROP = "drop"
    """Nothing."""
    TENSOR = "tensor"
    """It is one tensor, and is stored."""
    TENSORS = "tensors"
    """It is a sequence of tensors; each is stored, under one of the output handles."""
    KEEP = "keep"
    """It is stored, whatever it is."""
    ANSWER = "answer"
    """It is described to the client, and stored where it cannot leave the worker."""


class Modes(NamedTuple):
    """The state of a client's thread in which it recorded a call, and in which the call is executed."""

    grad: bool
    autocast: torch.dtype | None = None
    inference: bool = False
    anomaly: bool | None = None
    """True if ``torch.autograd.detect_anomaly`` looks for NaN; None where it is off."""
    dtype: torch.dtype = torch.float32
    """The dtype that ``torch.set_default_dtype`` has set."""

    @classmethod
    def current(cls) -> "Modes":
        """That of this thread: ``torch.no_grad``, ``torch.autocast``, of whichever device type, and their like.

        Raises SessionError: the thread is in a block that acts on local tensors, which would do nothing on the workers.
        """
        if torch._C._len_torch_dispatch_stack():
            raise SessionError(_ACTS_HERE.format("a TorchDispatchMode (FlopCounterMode, FakeTensorMode)"))
        grad = torch.is_grad_enabled()
        if grad and torch._C._autograd._top_saved_tensors_default_hooks(True):
            raise SessionError(_ACTS_HERE.format("saved_tensors_hooks (save_on_cpu, torch.utils.checkpoint)"))
        if torch._C._is_any_autocast_enabled() or torch.is_anomaly_enabled() or torch.is_inference_mode_enabled():
            return cls._unusual()
        if torch.get_default_dtype() is not torch.float32:
            return cls._unusual()
        return _WITH_GRAD if grad else _WITHOUT_GRAD

    @classmethod
    def _unusual(cls) -> "Modes":
        anomaly = torch.is_anomaly_check_nan_enabled() if torch.is_anomaly_enabled() else None
        types = ("cuda", "cpu", torch._C._get_accelerator().type)
        dtype = next((torch.get_autocast_dtype(each) for each in types if torch.is_autocast_enabled(each)), None)
        inference = torch.is_inference_mode_enabled()
        return cls(torch.is_grad_enabled(), dtype, inference, anomaly, torch.get_default_dtype())

    def contexts(self, device_type: str) -> list[AbstractContextManager[Any]]:
        """Contexts that a call of these modes is executed in, beside its grad mode, on a device of that type."""
        return [
            *([autocast(device_type, self.autocast)] if self.autocast else []),
            *([torch.inference_mode()] if self.inference else []),
            *([_DetectingAnomaly(self.anomaly)] if self.anomaly is not None else []),
            *([_DefaultDtype(self.dtype)] if self.dtype is not torch.float32 else []),
        ]


class _DetectingAnomaly:
    """``torch.autograd.detect_anomaly``, which cannot be entered more than once, without its warning."""

    def __init__(self, check_nan: bool) -> None:
        self._check_nan = check_nan

    def __enter__(self) -> None:
        self._before = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
        torch.set_anomaly_enabled(True, self._check_nan)

    def __exit__(self, *error: object) -> None:
        torch.set_anomaly_enabled(*self._before)


class _DefaultDtype:
    """``torch.set_default_dtype`` for a block."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __enter__(self) -> None:
        self._before = torch.get_default_dtype()
        torch.set_default_dtype(self._dtype)

    def __exit__(self, *error: object) -> None:
        torch.set_default_dtype(self._before)


_WITH_GRAD, _WITHOUT_GRAD = Modes(True), Modes(False)
_ACTS_HERE = (
    "{} acts on tensors of this process, not on the workers': leave the block first, or enter it there, in a function "
    "for session.run(); session.checkpoint() saves memory there"
)


@dataclass(eq=False, slots=True)
class Pattern:
    """A call at a place in the client's script."""

    function: str
    args: tuple[Template, ...]
    kwargs: tuple[tuple[str, Template], ...]
    result: ResultKind
    modes: Modes
    rank: int | None
    """The only rank that is to execute it; None for all."""
    file: str
    line: int
    number: int | None = None
    """The one that its instructions have; None while the workers do not know it."""
    error: Exception | None = None
    """Why its arguments could not be unpacked."""

    @property
    def templates(self) -> tuple[Template, ...]:
        """Those of all arguments, in order."""
        return (*self.args, *dict(self.kwargs).values())

    def pack(self, number: int) -> bytes:
        """The pattern as bytes, with the number that it is given."""
        # Its templates may name types of the client's script, which plain pickle does not carry.
        templates = dumps((self.args, self.kwargs))
        known = (self.function, self.result, self.modes, self.rank, self.file, self.line, number)
        return pickle.dumps((templates, known), protocol=5)

    @classmethod
    def unpack(cls, packed: bytes) -> "Pattern":
        """The pattern that :meth:`pack` packed; should its arguments name what is not here, with the error."""
        templates, (function, *others) = pickle.loads(packed)  # noqa: S301 - from a client that Ray has let in
        try:
            args, kwargs = pickle.loads(templates)  # noqa: S301
        except Exception as error:
            pattern = cls(function, (), (), *others)
            pattern.error = error
            return pattern
        return cls(function, args, kwargs, *others)


Instruction = tuple[Any, ...]


class Program(NamedTuple):
    """Instructions in the order in which they were recorded."""

    client: int
    """Number of the client that recorded them."""
    answer_from: tuple[int, ...]
    """The ranks that are to describe the last instruction's result, whose pattern is one of ``ResultKind.ANSWER``."""
    forgets: bool
    """True if the patterns that earlier programs brought are forgotten, and their numbers given out again."""
    patterns: list[bytes]
    """Patterns that the workers do not know, packed: see :meth:`Pattern.pack`."""
    instructions: list[Instruction | int]
    """An integer frees the handle."""

    def pack(self) -> bytes:
        """The program as bytes."""
        return pickle.dumps(tuple(self), protocol=5)

    @classmethod
    def unpack(cls, packed: bytes) -> "Program":
        """The program that :meth:`pack` packed."""
        return cls(*pickle.loads(packed))  # noqa: S301 - from a client that Ray has let in


class Report(NamedTuple):
    """Answer of a worker to a program."""

    answer: Any = None
    """The description of the last instruction's result, if that was asked for; see :mod:`.result_structure`."""
    failure: RemoteOpError | None = None
    """Why there is no answer."""
    errors: tuple[RemoteOpError, ...] = ()
    """The errors of the client's instructions since the last report."""
    printed: Printed = ()
    """Text that was printed meanwhile."""

    def pack(self) -> bytes:
        """The report as bytes."""
        answer = None if self.answer is None else _dumps(self.answer)
        return pickle.dumps((answer, self.failure, self.errors, self.printed), protocol=5)

    @classmethod
    def unpack(cls, packed: bytes) -> "Report":
        """The report that :meth:`pack` packed; with a failure in place of an answer that cannot be read here."""
        answer, failure, errors, printed = pickle.loads(packed)  # noqa: S301 - from a worker of this session
        try:
            return cls(answer and pickle.loads(answer), failure, errors, printed)  # noqa: S301
        except Exception as error:
            unreadable = RemoteOpError(
                f"the result cannot be read here ({type(error).__name__}: {error}): return tensors, numbers, words or "
                "lists of them, or keep it on the workers with session.object(...)"
            )
            return cls(failure=unreadable, errors=errors, printed=printed)


def _dumps(answer: Any) -> bytes:
    try:
        return pickle.dumps(answer, protocol=5)
    except (pickle.PicklingError, AttributeError, TypeError):  # a type of the client's script
        return dumps(answer)


# By itself pickle names whichever module has a "torch.channels_last": the client's script, which workers do not have.
copyreg.pickle(torch.memory_format, lambda value: (pkgutil.resolve_name, (str(value),)))


def bind(template: Template, on_leaf: dict[str, Callable[[Any], Any]]) -> Callable[[Iterator[Any]], Any]:
    """A function that builds an argument from leaves, in order; ``on_leaf`` converts each kind but ``Leaf.VALUE``."""
    if template == Leaf.VALUE:
        return next
    if isinstance(template, str):
        convert = on_leaf[template]
        return lambda leaves: convert(next(leaves))
    match template:
        case ("constant", _, value):
            return lambda leaves: value
        case ("sequence", kind, templates):
            build = sequence_builder(kind)
            parts = [bind(part, on_leaf) for part in templates]
            return lambda leaves: build([part(leaves) for part in parts])
        case ("mapping", keys_template, templates):
            keys = bind(keys_template, on_leaf)
            parts = [bind(part, on_leaf) for part in templates]
            return lambda leaves: {key: part(leaves) for key, part in zip(keys(leaves), parts, strict=True)}
    raise ValueError(f"{template!r} is no template")


def sequence_builder(kind: type) -> Callable[[list[Any]], Any]:
    """Return what makes a sequence of type ``kind`` of its items: lists, tuples, named tuples, slices."""
    if kind is slice or hasattr(kind, "_fields"):
        return lambda items: kind(*items)
    return kind
