"""Functions of PyTorch's that hand nothing to handles by themselves: given over to the workers, as one call."""

import functools
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from typing import Any

from torch import Tensor
from torch.autograd import Function

from raytorch.errors import SessionError
from raytorch.session import function_names, worker_functions
from raytorch.session.handles import Reference, first_of


@functools.cache
def intercept() -> None:
    """Give over from now on, in this process, what has handles among its arguments."""
    for function in _subclasses(Function):
        if isinstance(vars(function).get("forward"), staticmethod):
            checked = _refusing_handles(function.__name__, function.forward)
            function.forward = staticmethod(checked)  # type: ignore[method-assign]
    Function.apply = classmethod(_giving_over(vars(Function)["apply"]))
    for name in function_names.ON_LISTS:
        _intercept_lists(name)


def _subclasses(parent: type[Function]) -> Iterator[type[Function]]:
    """Those outside of PyTorch."""
    for function in parent.__subclasses__():
        if not function.__module__.startswith("torch."):
            yield function
        yield from _subclasses(function)


def _giving_over(plain: Any) -> Callable[..., Any]:
    """``torch.autograd.Function.apply``, which by itself leaves out backward where the arguments are handles."""

    def apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
        reference = first_of(Reference, (*args, *kwargs.values()))
        if reference is not None:
            return reference._recorder.call(worker_functions.apply, (cls, *args), kwargs)
        result = plain.__get__(None, cls)(*args, **kwargs)
        if first_of(Reference, [result]) is not None:
            raise SessionError(
                f"{cls.__name__}.forward uses a handle that is none of its arguments, so that backward would be left "
                "out: make it one"
            )
        return result

    return apply


def _intercept_lists(name: str) -> None:
    module, _, last = name.rpartition(".")
    function: Any = function_names.function_named(name)
    (cell,) = function.__closure__ or (None,)
    if cell is not None:  # it wraps the one that works: whatever name it was given before comes here too
        cell.cell_contents = _giving_over_lists(name, cell.cell_contents)
        return
    public = _giving_over_lists(name, function)
    for place in (import_module(module), import_module(function.__module__)):
        setattr(place, last, public)


def _giving_over_lists(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    """A function of parameters in a list or a generator, which may be handles."""

    @functools.wraps(plain)
    def public(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tuple(map(_listed, args)), {key: _listed(value) for key, value in kwargs.items()}
        values = (*args, *kwargs.values())
        reference = first_of(Reference, values)
        if reference is None:
            return plain(*args, **kwargs)
        if any(isinstance(part, Tensor) for value in values if isinstance(value, list | tuple) for part in value):
            raise SessionError(f"{name} takes handles, or local tensors, but not both in one call")
        return reference._recorder.call(function_names.function_named(name), args, kwargs)

    return public


def _listed(value: Any) -> Any:
    """A list in place of what can be gone through once, such as a generator."""
    if isinstance(value, Tensor | Reference | list | tuple | str) or not isinstance(value, Iterable):
        return value
    return list(value) or value  # PyTorch warns of a generator of nothing


def _refusing_handles(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    """A ``forward`` for a class whose ``apply`` may have another name by now, under which it is the old one."""

    @functools.wraps(forward)
    def refusing(*args: Any, **kwargs: Any) -> Any:
        if first_of(Reference, (*args, *kwargs.values())) is not None:
            raise SessionError(
                f"{name}.apply was given another name before the session began, so that backward would be left out: "
                f"call {name}.apply() itself, or name it later"
            )
        return forward(*args, **kwargs)

    return refusing
