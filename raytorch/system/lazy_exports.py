"""Packages whose names are imported when they are first asked for, so that what is light stays light (PEP 562)."""

from collections.abc import Callable, Collection
from importlib import import_module
from typing import Any


def lazy_exports(package: str, names: Collection[str], *files: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package that exports ``names``, each of the first of its ``files`` that has it.

    Example:
        >>> __getattr__ = lazy_exports(__name__, __all__, "file", "sweep")
    """

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        homes = (import_module(f"{package}.{file}") for file in files)  # no more of them than it takes
        return next(getattr(home, name) for home in homes if hasattr(home, name))

    return get
