"""The arguments of a call, taken apart: a template, which is the same each time, and the leaves, which are not."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch.autograd import forward_ad

from raytorch.errors import HandleError, SessionError
from raytorch.session import function_names, worker_functions
from raytorch.session.handles import Reference, first_of
from raytorch.session.pickling import Pickler, dumps
from raytorch.session.program import MOST_PATTERNS, Leaf, Template
from raytorch.session.tensor_transfer import Payload

K = TypeVar("K")
V = TypeVar("V")

VALUES = {int, float, complex}
"""Types of numbers, which travel as they are."""
_ASKED_EACH_TIME = {f"torch.Tensor.{name}.__get__" for name in ("grad", "grad_fn", "_base", "_grad", "_grad_fn")}
"""Their result may be None now and a tensor later."""
_WORDS = {type(None), bool, str}
_CONSTANTS = _WORDS | {type(...), torch.dtype, torch.device, torch.layout, torch.memory_format}
_LONGEST_CONSTANT = 1000
"""Characters of a string that may be part of a pattern."""


class BoundedCache(dict[K, V]):
    """Cache of what is known of calls, and can be found out again: all of it is forgotten when there is too much."""

    __slots__ = ()

    def __setitem__(self, key: K, value: V) -> None:
        if len(self) >= MOST_PATTERNS:
            self.clear()
        super().__setitem__(key, value)


class Function:
    """Knowledge that the client has of a function. Raises UnknownFunctionError: the workers do not know it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.name = name = function_names.name_of(function)
        self.in_place = function_names.changes_first_argument(name)
        self.learnable = name not in _ASKED_EACH_TIME
        self.gives_value = function_names.gives_value(name)
        self.is_operator = function_names.is_operator(name)
        self.on_object = function in (worker_functions.call, worker_functions.method)


known = functools.cache(Function)


class CallStructure(NamedTuple):
    """A call without its leaves."""

    function: Function
    args: tuple[Template, ...]
    kwargs: tuple[tuple[str, Template], ...]


class Arguments:
    """The arguments of a call of ``rank`` alone, or of all, taken apart into templates and leaves.

    With ``is_learned`` the kind of result is learned by the call's shape, which strings and keys are part of then;
    otherwise whatever is plain is a leaf, so that calls with ever other words are of one shape. With ``has_graph``
    autograd is to see the call, so that local tensors that require grad are refused.

    Raises UnknownFunctionError; HandleError: an argument is of another session; SessionError: the arguments are on
    different ranks, or one of them cannot be sent.
    """

    def __init__(
        self,
        recorder: Any,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        rank: int | None,
        *,
        is_learned: bool = False,
        has_graph: bool = False,
    ) -> None:
        called = known(function)
        self._recorder, self._is_learned = recorder, is_learned
        self._is_differentiable = has_graph and not called.gives_value and torch.is_grad_enabled()
        self._is_operator = called.is_operator
        self._meets_handle = is_learned or first_of(Reference, (args, kwargs)) is not None
        self._uploaded: list[Reference] = []  # kept until the call is recorded
        self.leaves: list[Any] = []
        self.has_code = False
        self.rank = rank
        """The only rank that has the arguments; None if all have them."""
        templates = tuple([self._template(value) for value in args])
        named_templates = tuple([(name, self._template(value)) for name, value in kwargs.items()])
        self.structure = CallStructure(called, templates, named_templates)

    def _template(self, value: Any) -> Template:
        kind = type(value)
        if isinstance(value, Reference):
            return self._reference(value)
        if kind in VALUES or (kind in _WORDS and not self._is_learned):
            self.leaves.append(value)
            return Leaf.VALUE
        if kind in _CONSTANTS and not (kind is str and len(value) > _LONGEST_CONSTANT):
            return ("constant", kind, value)
        if kind is slice:
            return self._sequence(kind, (value.start, value.stop, value.step))
        if isinstance(value, tuple | list):
            return self._sequence(kind, value)
        if kind is dict:
            return self._mapping(value)
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        return self._rare(value)

    def _tensor(self, tensor: torch.Tensor) -> Template:
        if _is_transformed(tensor):
            raise SessionError(
                "a local tensor that torch.func, torch.vmap or forward-mode autograd works on cannot meet a handle: "
                "run the transform on the workers, in a function for session.run()"
            )
        if self._is_differentiable and tensor.requires_grad:
            raise SessionError(_NO_GRADIENT)
        if isinstance(tensor, torch.nn.Parameter):
            return self._rare(tensor)
        self._uploaded.append(self._recorder.upload([Payload.of(tensor)], self.rank))
        self._reference(self._uploaded[-1])
        return Leaf.COPY

    def _rare(self, value: Any) -> Template:
        if isinstance(value, np.generic):
            self.leaves.append(value)
            return Leaf.VALUE
        if isinstance(value, torch.Generator):
            raise SessionError(
                "a generator of the client's cannot draw on the workers: seed them with session.manual_seed(), or make "
                "one there with session.object(torch.Generator) and give it to a method"
            )
        if isinstance(value, np.ndarray) and self._is_operator:
            raise SessionError("a NumPy array is no operand of a handle: send it with session.tensor(array)")
        self.has_code = True
        self.leaves.append(dumps(value, _Pickler if self._is_differentiable and self._meets_handle else Pickler))
        return Leaf.CODE

    def _sequence(self, kind: type, parts: Sequence[Any]) -> Template:
        begin = len(self.leaves)
        templates = tuple([self._template(part) for part in parts])
        if not self._is_learned and kind in (list, tuple) and all(template == Leaf.VALUE for template in templates):
            self.leaves[begin:] = [kind(self.leaves[begin:])]
            return Leaf.VALUE
        return ("sequence", kind, templates)

    def _mapping(self, mapping: dict[Any, Any]) -> Template:
        for key in mapping:  # they travel without a look into them
            if not _is_plain(key):
                raise SessionError(f"a dictionary's key is a {type(key).__name__}: use strings or numbers as keys")
        keys, begin = tuple(mapping), len(self.leaves)
        templates = tuple([self._template(part) for part in mapping.values()])
        if self._is_learned:
            return ("mapping", ("constant", tuple(map(type, keys)), keys), templates)  # 1, 1.0 and True are equal
        if all(template == Leaf.VALUE for template in templates):
            self.leaves[begin:] = [dict(zip(keys, self.leaves[begin:], strict=True))]
            return Leaf.VALUE
        self.leaves.insert(begin, keys)
        return ("mapping", Leaf.VALUE, templates)

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
        return Leaf.HANDLE


_NO_GRADIENT = (
    "a local tensor that requires grad would get no gradient from the workers: have it there, by session.module(...) "
    "or session.tensor(w, requires_grad=True), or give its detach()"
)


class _Pickler(Pickler):
    """Refuses tensors that require grad, in whatever they are."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.requires_grad:
            raise SessionError(_NO_GRADIENT)
        return super().reducer_override(value)


def _is_transformed(tensor: torch.Tensor) -> bool:
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def _is_plain(key: Any) -> bool:
    if type(key) is tuple:
        return all(map(_is_plain, key))
    return type(key) in _CONSTANTS or type(key) in VALUES
