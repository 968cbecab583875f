"""Packages whose names are imported when they are first asked for, so that what is light stays light (PEP 562)."""

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any


def lazy_exports(
    package: str, homes: Mapping[str, Iterable[str]], modules: Mapping[str, str] | None = None
) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package that exports the names in ``homes``, by the module of it that each is in, and
    ``modules`` themselves: by their names, where each is in the package.

    Example:
        >>> __getattr__ = lazy_exports(__name__, {"file": ["load_sweep"]})
    """
    modules = modules or {}
    home_of = {name: home for home, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name in modules:
            return import_module(f"{package}.{modules[name]}")
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{home_of[name]}"), name)

    return get
