"""RemoteTensor: used like a ``torch.Tensor``, and living on the workers."""

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch import Tensor

from raytorch.errors import SessionError
from raytorch.session import worker_functions
from raytorch.session.function_names import BINARY, SETTABLE
from raytorch.session.handles import Reference, first_of
from raytorch.session.hooks import require_hooks_without_effects


class RemoteTensor(Reference):
    """A tensor on the workers of a session: one on each rank, or one on a single rank.

    Operators, functions of ``torch`` and ``torch.nn.functional``, methods and attributes of ``torch.Tensor`` are
    recorded and executed on the workers in order. What is no tensor is waited for: ``shape``, ``item()``,
    ``torch.equal(a, b)``; it is rank 0's, unless ``all=True`` asks for every rank's.

    Raises (from what is waited for):
        RemoteOpError: The tensor depends on an operation that failed, or an earlier one did.
        SessionLostError: The session has ended.
    """

    __slots__ = ()
    __hash__ = object.__hash__
    __array_ufunc__ = None  # NumPy's scalars and arrays leave operators to the handle, and its functions refuse it

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """How PyTorch calls its functions on handles."""
        handle = first_of(Reference, (args, kwargs))
        assert handle is not None
        return handle._recorder.call(function, args, kwargs)

    def fetch(self, *, all: bool = False) -> Any:  # noqa: A002
        """The tensor's content as a local CPU tensor; with ``all``, a list of every rank's.

        A large one stays in the memory of Ray's object store for as long as the local tensor lives.
        """
        if all:
            return [payload.adopted() for payload in self._recorder.ask_all(worker_functions.fetch, self)]
        return self._recorder.ask(worker_functions.fetch, self).adopted()

    def item(self, *, all: bool = False) -> Any:  # noqa: A002
        """The only element as a Python number; with ``all``, a list of every rank's. See ``torch.Tensor.item``."""
        if all:
            return self._recorder.ask_all(Tensor.item, self)
        return self._recorder.ask(Tensor.item, self)

    def numpy(self) -> np.ndarray[Any, Any]:
        """The tensor's content as a local array.

        Raises:
            SessionError: It requires grad, which the array would not; detach() it first, as with ``torch.Tensor``.
        """
        tensor: Tensor = self.fetch()
        if tensor.requires_grad:
            raise SessionError("the tensor requires grad, of which an array keeps nothing: use detach().numpy()")
        return tensor.numpy()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        return np.asarray(self.numpy(), dtype=dtype)

    def __format__(self, spec: str) -> str:
        return str(self._recorder.ask(Tensor.__format__, self, spec)) if spec else repr(self)

    def __iter__(self) -> Iterator["RemoteTensor"]:
        return iter(self._recorder.ask(Tensor.unbind, self))

    def _become_parameter(self, _: bool) -> None:
        raise SessionError(
            "a handle is no parameter of a local module: make the module on the workers, with session.module(...), or "
            "a leaf there, with requires_grad_()"
        )

    _is_param = property(fset=_become_parameter)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"'RemoteTensor' object has no attribute {name!r}")
        attribute = inspect.getattr_static(Tensor, name, None)
        if attribute is None:
            raise AttributeError(f"neither RemoteTensor nor torch.Tensor has an attribute {name!r}")
        if inspect.isdatadescriptor(attribute):
            return self._recorder.call(getattr(Tensor, name).__get__, (self,))
        return functools.partial(_call, getattr(Tensor, name), self)


def _call(method: Callable[..., Any], tensor: RemoteTensor, /, *args: Any, **kwargs: Any) -> Any:
    """Call a method of ``torch.Tensor`` on a handle."""
    if "hook" in method.__name__:
        require_hooks_without_effects((*args, *kwargs.values()))
    return tensor._recorder.call(method, (tensor, *args), kwargs)


def _operator(name: str) -> Callable[..., Any]:
    function = getattr(Tensor, name)

    def operate(self: RemoteTensor, *args: Any) -> Any:
        return self._recorder.call(function, (self, *args))

    operate.__name__ = name
    return operate


def _settable(name: str) -> property:
    getter, setter = getattr(Tensor, name).__get__, getattr(Tensor, name).__set__

    def get(self: RemoteTensor) -> Any:
        return self._recorder.call(getter, (self,))

    def put(self: RemoteTensor, value: Any) -> None:
        self._recorder.do(setter, self, value)

    return property(get, put, doc=f"As ``torch.Tensor.{name}``.")


_OPERATORS = [
    *(f"__{prefix}{name}__" for name in BINARY for prefix in ("", "r", "i")),
    *("__div__", "__rdiv__", "__idiv__", "__neg__", "__pos__", "__abs__", "__invert__", "__getitem__", "__setitem__"),
    *("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"),
    *("__bool__", "__float__", "__int__", "__complex__", "__index__", "__len__", "__contains__"),
]
for _name in _OPERATORS:
    if hasattr(Tensor, _name):
        setattr(RemoteTensor, _name, _operator(_name))
for _name in SETTABLE:
    setattr(RemoteTensor, _name, _settable(_name))
