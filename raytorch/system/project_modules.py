"""Importing a project's modules from their texts, on machines that need not have its files."""

import builtins
import linecache
import posixpath
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import ExecutionLoader, Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from types import ModuleType
from typing import Any
from weakref import WeakSet

from raytorch.system.python_files import is_taken, module_name

NOT_SENT = "the modules of a project are sent where an import statement names them, and others where they are installed"

LOCK = threading.RLock()
"""Held while one project's modules take another's place; code that is imported may ask for that itself."""


class ProjectModules(MetaPathFinder, ExecutionLoader):
    """Finds and loads the modules of a project, whose files are texts by their paths from its root.

    A file is imported by its path, ``nets/tagger.py`` as ``nets.tagger`` (see
    :func:`~raytorch.system.python_files.module_name`), and a folder without ``__init__.py`` is a
    package as well. Beside the root, modules are found in the folders of the ``entries``, as beside a script, and are
    the same modules as by their paths. A module of Python's own, or one that raytorch needs, is never replaced.

    Modules of several projects may have the same names: one project at a time has them in ``sys.modules``, and an
    import statement in a project's function, whenever it is called, finds that project's.

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
        self._modules: dict[str, ModuleType] = {}
        """Those that were imported, while others have their names."""
        self._displaced: dict[str, ModuleType] = {}
        """What had their names before."""
        self.has_names = False
        """True if its modules are in ``sys.modules``."""
        _projects.add(self)

    @property
    def is_installed(self) -> bool:
        """True if import statements look here first."""
        return self in sys.meta_path

    def install(self) -> None:
        """Have import statements look here first, and nowhere in other projects."""
        with LOCK:
            for other in [*_projects]:
                if other is not self:
                    other.put_away()
            if not self.has_names:
                self._displaced = {name: sys.modules[name] for name in self._modules if name in sys.modules}
                sys.modules.update(self._modules)
                self.has_names = True
            if not self.is_installed:
                sys.meta_path.insert(0, self)

    def retire(self) -> None:
        """Have import statements look here no more; what was imported keeps its names, to be pickled by, say."""
        with LOCK:
            if self.is_installed:
                sys.meta_path.remove(self)

    def put_away(self) -> None:
        """As :meth:`retire`, and let others have the names; :meth:`install` brings the modules back."""
        with LOCK:
            self.retire()
            if self.has_names:
                self._modules = {name: sys.modules.pop(name) for name in self._served if name in sys.modules}
                sys.modules.update(self._displaced)
                self.has_names = False
                for file in self._sources:
                    linecache.cache.pop(self._path(file), None)

    def uninstall(self) -> None:
        """As :meth:`put_away`, and forget the modules."""
        self.put_away()
        self._served.clear()
        self._modules.clear()

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

    def exec_module(self, module: ModuleType) -> None:
        """Run a module, whose import statements find the project's modules also when another has their names."""
        vars(module)["__builtins__"] = {**vars(builtins), "__import__": self._import}
        super().exec_module(module)

    def _import(
        self,
        name: str,
        globals_: Mapping[str, Any] | None = None,
        locals_: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        """What the project's import statements call, in place of Python's own ``__import__``."""
        top = name.partition(".")[0]
        is_own = level > 0 or any(each in self._files or each in self._folders for each in self._possible(top))
        if self.is_installed or not is_own or is_taken(top):
            return builtins.__import__(name, globals_, locals_, fromlist, level)
        with in_place_of_others():
            self.install()
            return builtins.__import__(name, globals_, locals_, fromlist, level)

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


_projects: WeakSet[ProjectModules] = WeakSet()


@contextmanager
def in_place_of_others() -> Iterator[None]:
    """Let a project be installed in the block; afterwards import statements look where they did before it."""
    with LOCK:
        owner = next((each for each in _projects if each.has_names), None)
        was_installed = owner is not None and owner.is_installed
        try:
            yield
        finally:
            for each in [*_projects]:
                each.put_away()
            if owner:
                owner.install()
            if owner and not was_installed:
                owner.retire()


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
