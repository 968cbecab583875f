"""Importing a project's modules from their texts, on machines that need not have its files."""

import linecache
import posixpath
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.abc import ExecutionLoader, Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from types import ModuleType
from typing import Any

from raytorch.system.python_files import is_taken, module_name

NOT_SENT = "the modules of a project are sent where an import statement names them, and others where they are installed"


class ProjectModules(MetaPathFinder, ExecutionLoader):
    """Finds and loads the modules of a project, whose files are texts by their paths from its root.

    A file is imported by its path, ``nets/tagger.py`` as ``nets.tagger`` (see
    :func:`~raytorch.system.python_files.module_name`), and a folder without ``__init__.py`` is a
    package as well. Beside the root, modules are found in the folders of the ``entries``, as beside a script, and are
    the same modules as by their paths. A module of Python's own, or one that raytorch needs, is never replaced.

    Example:
        >>> modules = ProjectModules("/project", {"nets/tagger.py": "WIDTH = 8"})
        >>> modules.install()
        >>> modules.load("nets/tagger.py", "WIDTH")
        8
        >>> modules.uninstall()
    """

    def __init__(self, root: str, sources: Mapping[str, str], entries: Iterable[str] = ()) -> None:
        self._root, self._sources = root, dict(sources)
        by_precedence = sorted(self._sources, key=_is_package)  # a package is found before a file of its name
        self._files = {module_name(file): file for file in by_precedence}
        self._folders = {module_name(folder): folder for file in self._sources for folder in _folders(file)}
        self._beside = sorted({module_name(posixpath.dirname(entry)) for entry in entries} - {""})
        self._served: set[str] = set()

    def install(self) -> None:
        """Have import statements look here first."""
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def uninstall(self) -> None:
        """Take back :meth:`install`, and forget the modules that were imported, so that others may have their names."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        for name in self._served:
            sys.modules.pop(name, None)
        for file in self._sources:
            linecache.cache.pop(self._path(file), None)
        self._served.clear()

    def load(self, file: str, name: str) -> Any:
        """Import a file, and answer what is called ``name`` at its top level.

        Raises whatever the file raises, and ImportError where it has no such name, or another module has its own.
        """
        module_of_file = module_name(file)
        try:
            module = import_module(module_of_file)
        except ModuleNotFoundError as error:
            if not hasattr(error, "__notes__"):
                error.add_note(NOT_SENT)
            raise
        if module_of_file not in self._served and getattr(module, "__file__", None) != self._path(file):
            raise ImportError(
                f"{file} cannot be imported as {module_of_file}, as another module has that name: {module!r}; rename "
                "the file"
            )
        if not hasattr(module, name):
            raise ImportError(f"{file} has run, and has no {name}; define it at the top level")
        return getattr(module, name)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """How a module is to be loaded, None if it is not of the project.

        Raises ModuleNotFoundError for what is missing in a package of the project: no other finder looks there.
        """
        above = fullname.rpartition(".")[0]
        if is_taken(fullname) or (above and above not in self._served):
            return None
        name = next((each for each in self._possible(fullname) if each in self._files or each in self._folders), None)
        if name is None and above:
            missing = ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
            missing.add_note(NOT_SENT)
            raise missing
        if name is None:
            return None
        self._served.add(fullname)
        return self._spec(name) if name == fullname else ModuleSpec(fullname, _SameModule(name))

    def get_filename(self, fullname: str) -> str:
        """The path of a module's file, where the project is. Raises ImportError for what is no module of it."""
        return self._path(self._file(fullname))

    def get_source(self, fullname: str) -> str:
        """The text of a module, which tracebacks show. Raises ImportError for what is no module of the project."""
        return self._sources[self._file(fullname)]

    def is_package(self, fullname: str) -> bool:
        """Tell whether a module is a package. Raises ImportError for what is no module of the project."""
        return _is_package(self._file(fullname))

    def _possible(self, name: str) -> list[str]:
        """The names from the root under which there may be what is imported as ``name``."""
        return [name, *(f"{folder}.{name}" for folder in self._beside)]

    def _spec(self, name: str) -> ModuleSpec | None:
        if name not in self._files:  # a folder alone
            spec = ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [self._path(self._folders[name])]
            return spec
        path = self.get_filename(name)
        below = [posixpath.dirname(path)] if self.is_package(name) else None
        return spec_from_file_location(name, path, loader=self, submodule_search_locations=below)

    def _file(self, name: str) -> str:
        try:
            return self._files[name]
        except KeyError:
            raise ImportError(f"{name} is no module of the project in {self._root}", name=name) from None

    def _path(self, file: str) -> str:
        return posixpath.join(self._root, file)


class _SameModule(Loader):
    """Loads, under another name, the module that has been or is imported as ``name``."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._spec: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(self._name)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # which importlib has replaced, though the module has run


def _is_package(file: str) -> bool:
    return posixpath.basename(file) == "__init__.py"


def _folders(file: str) -> Iterator[str]:
    """The folders that a file is in."""
    parts = file.split("/")[:-1]
    return ("/".join(parts[: depth + 1]) for depth in range(len(parts)))
