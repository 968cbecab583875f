"""Functions of PyTorch's that hand nothing to handles by themselves: given over to the workers, as one call."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch.autograd import Function

from raytorch.errors import SessionError
from raytorch.session import primitives
from raytorch.session.arguments import first_reference


@functools.cache
def intercept() -> None:
    """Give over from now on, in this process, what has handles among its arguments."""
    for function in _subclasses(Function):
        if isinstance(vars(function).get("forward"), staticmethod):
            checked = _refusing_handles(function.__name__, function.forward)
            function.forward = staticmethod(checked)  # type: ignore[method-assign]
    Function.apply = classmethod(_giving_over(vars(Function)["apply"]))


def _subclasses(parent: type[Function]) -> Iterator[type[Function]]:
    """Those outside of PyTorch."""
    for function in parent.__subclasses__():
        if not function.__module__.startswith("torch."):
            yield function
        yield from _subclasses(function)


def _giving_over(plain: Any) -> Callable[..., Any]:
    """``torch.autograd.Function.apply``, which by itself leaves out backward where the arguments are handles."""

    def apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
        reference = first_reference((*args, *kwargs.values()))
        if reference is not None:
            return reference._recorder.call(primitives.apply, (cls, *args), kwargs)
        result = plain.__get__(None, cls)(*args, **kwargs)
        if first_reference([result]) is not None:
            raise SessionError(
                f"{cls.__name__}.forward uses a handle that is none of its arguments, so that backward would be left "
                "out: make it one"
            )
        return result

    return apply


def _refusing_handles(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    """A ``forward`` for a class whose ``apply`` may have another name by now, under which it is the old one."""

    @functools.wraps(forward)
    def refusing(*args: Any, **kwargs: Any) -> Any:
        if first_reference((*args, *kwargs.values())) is not None:
            raise SessionError(
                f"{name}.apply was given another name before the session began, so that backward would be left out: "
                f"call {name}.apply() itself, or name it later"
            )
        return forward(*args, **kwargs)

    return refusing
