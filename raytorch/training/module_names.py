"""Parts of a model by patterns of their names, those that are repeated, and modules that behave otherwise than named.

Such a module gets a class derived from its own, as PyTorch's parametrizations do: its state dict stays as it is, and
copies of the model, an average of its weights say, behave as it does.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from raytorch.errors import ConfigError
from raytorch.system.near_names import did_you_mean

MOST_NAMES = 12
"""Names that an error lists."""
SMALL = 100
"""A module that has so many times fewer parameters than the largest beside it counts for nothing of its own."""


def matching(key: str, patterns: Sequence[str], kind: str, names: Iterable[str], groups: Iterable[str]) -> list[str]:
    """The names that are like one of ``patterns``, in their order. Raises ConfigError for a pattern without one.

    Args:
        key: That of the patterns, for messages.
        patterns: Names in which ``*`` stands for any text.
        kind: What has the names: ``parameter`` or ``module``.
        names: Those that there are.
        groups: Patterns of several of them, which may have been meant: ``stem.*``.

    Example:
        >>> matching("model.freeze", ["stem.*"], "parameter", ["stem.bias", "head.bias"], ["stem.*"])
        ['stem.bias']
    """
    names = list(names)
    near = [*names, *groups]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            inside = f"{pattern}.*"
            meant = f" (did you mean {inside!r}?)" if inside in near else did_you_mean(pattern, near)
            raise ConfigError(
                f"{key}: no {kind} has a name like {pattern!r}{meant}; there are "
                f"{', '.join(names[:MOST_NAMES])}{', ...' if len(names) > MOST_NAMES else ''}"
            )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def derive(module: nn.Module, **methods: Callable[..., Any]) -> None:
    """Give a module a class derived from its own, in which ``methods`` take the place of those of the same name.

    Each is called with the method that it takes the place of, the module, and the call's arguments.
    """
    kind = type(module)
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    module.__class__ = type(
        kind.__name__, (kind,), names | {name: _around(getattr(kind, name), method) for name, method in methods.items()}
    )


def _around(inner: Callable[..., Any], outer: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return outer(inner, self, *args, **kwargs)

    return method


def repeated(model: nn.Module, prefix: str = "") -> Iterator[str]:
    """Names of the members of lists of which these have several of one class, the outermost of those inside each other.

    What is small beside the largest of its list is left out.
    """
    members = dict(model.named_children())
    kinds = Counter(kind_of(member) for member in members.values() if is_called(member))
    is_list = isinstance(model, (nn.ModuleList, nn.Sequential, nn.ModuleDict))
    largest = max(map(size, members.values()), default=0)
    for name, member in members.items():
        is_repeated = is_list and kinds[kind_of(member)] > 1
        if is_repeated and size(member) * SMALL >= largest > 0:
            yield f"{prefix}{name}"
        elif not is_repeated:
            yield from repeated(member, f"{prefix}{name}.")


def kind_of(module: nn.Module) -> str:
    """The name of its class, which those have as well that are derived from it under the same name."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def is_called(module: nn.Module) -> bool:
    """Tell whether the module is one that is called, which a list of modules is not."""
    kind: Any = type(module)
    return bool(kind.forward is not nn.Module.forward)


def size(module: nn.Module) -> int:
    """How many numbers its parameters have."""
    return sum(parameter.numel() for parameter in module.parameters())
