"""Classes and functions of the running program, as references to the files that they are in.

What a notebook or a prompt defines is in no file: its source is put together with all that it uses, as the text of a
file ``interactive.py`` that is in the project as far as the run is concerned. Nothing is pickled, so that such a run is
recorded, compared and resumed as any other.
"""

import __future__

import inspect
import os
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from types import BuiltinFunctionType, ModuleType
from typing import Any

from raytorch.config.code_snapshot import CodeSnapshot
from raytorch.config.interactive_code import FILE, FUTURE, Definition, assembled, definition, reduced
from raytorch.config.project import Project, Reference
from raytorch.config.session_sources import code_of, is_of_session, method_set_later, namespace_of, source_of
from raytorch.system.python_files import ProjectError, is_taken, module_name, read_source

LONGEST_VALUE = 100_000
"""Characters of a number, text, list or mapping that is written down as it is."""
_INSTALLED = ("site-packages", "dist-packages")


def is_live(value: Any) -> bool:
    """Tell whether a value is a class or a function, and so may stand where a reference would."""
    return isinstance(value, type) or inspect.isroutine(value)


def live_project(values: Sequence[Any], folder: Path) -> tuple[Project, list[Reference]]:
    """The project that classes and functions are of, and a reference to each.

    Args:
        values: The classes and functions.
        folder: Where the program runs: its project is taken if it has them, else that of their files.

    Raises ProjectError for what is defined in a function or has no source.

    Example:
        >>> project, [tagger] = live_project([Tagger], Path())
        >>> str(tagger)
        'nets/tagger.py:Tagger'
    """
    files = {id(value): _file_of(value) for value in values}
    project = _project_of([file for file in files.values() if file], folder)
    here = _interactive_file(project, folder)
    references = []
    collection = _Collection()
    for value in values:
        file = files[id(value)]
        if file and file.is_relative_to(project.root):
            references.append(Reference(file.relative_to(project.root).as_posix(), value.__name__))
        else:
            collection.add(value.__name__, value, namespace_of(value))
            references.append(Reference(here, value.__name__))
    return (project.having({here: collection.text()}) if collection.definitions else project), references


def recalled(project: Project, names: Sequence[str]) -> Project:
    """The project with the text of ``interactive.py`` that its references ``names`` mean, where it is no file.

    That is of what the session defines now; the project as it is where that has no such classes and functions.
    """
    files = {file for name in names if PurePath(file := name.rpartition(":")[0]).name == FILE}
    if len(files) != 1 or (project.root / (file := files.pop())).exists():
        return project
    main, collection = vars(sys.modules["__main__"]), _Collection()
    for name in (name.rpartition(":")[2] for name in names if name.startswith(f"{file}:")):
        value = main.get(name)
        if not (is_live(value) and value.__module__ == "__main__" and _file_of(value) is None):
            return project
        collection.add(name, value, main)
    return project.having({file: collection.text()})


def live_value(reference: str, code: CodeSnapshot) -> Any:
    """The class or function of the running program that ``reference`` means, if it is of the same source; else None.

    So a model is of the class that the user has, and a script is not run once more to have it.
    """
    file, _, name = reference.rpartition(":")
    value: Any = vars(sys.modules["__main__"]).get(name)
    if not is_live(value) or value.__module__ != "__main__" or value.__qualname__ != name:
        return None
    try:
        return value if _text_of(value) == _text_in(code, file, name) else None
    except ProjectError:
        return None


def _text_of(value: Any) -> tuple[str, str]:
    """The file of something that the program has defined, and its text."""
    if path := _file_of(value):
        return str(path), read_source(path, path.name)
    collection = _Collection()
    collection.add(value.__name__, value, namespace_of(value))
    return FILE, collection.text()


def _text_in(code: CodeSnapshot, file: str, name: str) -> tuple[str, str]:
    if remembered(code).texts.get(file):
        return FILE, reduced(code.sources[file], name)
    return os.path.realpath(Path(code.root, file)), code.sources[file]


def remembered(code: CodeSnapshot) -> Project:
    """The project that a run's code is of, with the text of its session where that is no file."""
    project = Project(Path(code.root))
    files = [file for file in code.sources if PurePath(file).name == FILE and not (project.root / file).exists()]
    return project.having({file: code.sources[file] for file in files})


def _file_of(value: Any) -> Path | None:
    """The file that a class or function is to be found in by its name; None of what is in none, or is installed.

    Raises ProjectError for what is not at the top level.
    """
    name = value.__qualname__
    if not name.isidentifier():
        kind = "a lambda" if name.endswith("<lambda>") else "inside another function or class"
        raise ProjectError(f"{name} is {kind}; define it by its name at the top level of a file or cell")
    module = sys.modules.get(value.__module__ or "")
    file = getattr(module, "__file__", None) or ""
    code = code_of(value)
    in_session = code is not None and is_of_session(code.co_filename)
    if getattr(module, name, None) is not value or not file.endswith(".py") or in_session or _is_installed(file):
        return None
    return Path(os.path.realpath(file))


def _is_installed(file: str) -> bool:
    standard = Path(sysconfig.get_paths()["stdlib"])
    return Path(file).is_relative_to(standard) or any(part in _INSTALLED for part in Path(file).parts)


def _project_of(files: Sequence[Path], folder: Path) -> Project:
    """The project of the folder, or of a file, whichever has all files by plain names; else that of the first."""
    projects = [Project.of(each) for each in (folder, *(file.parent for file in files))]
    return next(
        (each for each in projects if all(_has_plain_names(_folders(file.parent, each)) for file in files)),
        projects[bool(files)],
    )


def _interactive_file(project: Project, folder: Path) -> str:
    """Where the session's code is: beside what it imports from its folder, if modules can be in that."""
    return "/".join((*(_folders(folder.resolve(), project) or ()), FILE))


def _folders(place: Path, project: Project) -> tuple[str, ...] | None:
    """The folders that lead from a project's root to a place in it; None if modules cannot be imported from there."""
    root = project.root.resolve()
    parts = place.relative_to(root).parts if place.is_relative_to(root) else ("..",)
    return None if parts[:1] == ("..",) or (parts and is_taken(module_name(parts[0]))) else parts


def _has_plain_names(folders: tuple[str, ...] | None) -> bool:
    return folders is not None and all(module_name(part) == part for part in folders)


class _Collection:
    """Definitions of a session, each with those that it uses."""

    def __init__(self) -> None:
        self.definitions: dict[str, Definition] = {}

    def text(self) -> str:
        """All of it as the text of a file."""
        return assembled(self.definitions)

    def add(self, name: str, value: Any, there: Mapping[str, Any], user: str = "the run") -> None:
        """Add what is called ``name`` in the namespace ``there``, where ``user`` uses it, and all that it uses."""
        if name in self.definitions:
            return
        text = _imported(name, value)
        is_code = text is None and is_live(value)
        if text is None and is_code:
            text = _code(name, value)
        if text is None:
            text = _literal(name, value)
        if text is None:
            raise ProjectError(
                f"{user} uses {name}, {_kind(value)} of the session, which is neither code nor plain data and so is "
                f"not sent: make it in {user}, from what can be given as an argument"
            )
        self.definitions[name] = definition(text)
        if isinstance(value, PurePath):
            self.definitions["pathlib"] = definition("import pathlib")
        if is_code and name != value.__name__:
            self.add(value.__name__, value, namespace_of(value), user)
        elif is_code:
            self._add_used(name, namespace_of(value))

    def _add_used(self, user: str, there: Mapping[str, Any]) -> None:
        if isinstance(there.get("annotations"), __future__._Feature):
            self.definitions[FUTURE] = definition("from __future__ import annotations")
        for name in sorted(self.definitions[user].names):
            first, dot, _ = name.partition(".")
            if not dot and name in there:  # else one of Python's own, or as undefined as it is there
                self.add(name, there[name], there, user)
            elif dot and getattr(there.get(first), "__name__", "") == first and _is_module(sys.modules.get(name)):
                self.definitions[name] = definition(f"import {name}")


def _is_module(value: Any) -> bool:
    return isinstance(value, ModuleType)


def _imported(name: str, value: Any) -> str | None:
    """The statement that imports a value of a module as ``name``; None if there is no such module."""
    if isinstance(value, ModuleType):
        home = value.__name__
        is_there = sys.modules.get(home) is value and home != "__main__"
        return (f"import {home}" if home == name else f"import {home} as {name}") if is_there else None
    for home in (str(getattr(value, "__module__", "")), type(value).__module__):
        module = sys.modules.get(home)
        if module is None or home == "__main__" or (home == "builtins" and not _is_built_in(value)):
            continue
        others = sorted(each for each, there in vars(module).items() if there is value)
        names = [name, str(getattr(value, "__qualname__", name)), *others]
        own = next((each for each in names if vars(module).get(each) is value), None)
        if own:
            return f"from {home} import {own}" if own == name else f"from {home} import {own} as {name}"
    return None


def _is_built_in(value: Any) -> bool:
    """Tell what can be imported of Python's own names: ``None`` and ``True`` cannot."""
    return isinstance(value, type | BuiltinFunctionType) and value.__module__ == "builtins"


def _code(name: str, value: Any) -> str:
    if value.__name__ == "<lambda>":
        raise ProjectError(f"{name} is a lambda, which is not sent; define it with def")
    if name != value.__name__:
        return f"{name} = {value.__name__}"
    text = source_of(value)
    if isinstance(value, type) and (method := method_set_later(value, text)):
        raise ProjectError(
            f"{name}.{method} was given to {name} after it was defined, whose text is sent without it; define it in "
            "the class"
        )
    return text


def _literal(name: str, value: Any) -> str | None:
    if isinstance(value, PurePath):
        return f"{name} = pathlib.Path({str(value)!r})"
    try:
        text = _written(value)
    except RecursionError:  # it holds itself
        return None
    return None if text is None or len(text) > LONGEST_VALUE else f"{name} = {text}"


def _written(value: Any) -> str | None:
    """A plain value as Python reads it; None if there is no such text, or it is too long."""
    is_text, is_several = type(value) in (str, bytes), type(value) in (list, tuple, set, dict)
    if (is_text or is_several) and len(value) > LONGEST_VALUE:
        return None
    if is_several and value:
        parts = [_pair(*each) if isinstance(value, dict) else _written(each) for each in _items(value)]
        if any(part is None for part in parts):
            return None
        inner = ", ".join(sorted(map(str, parts)) if isinstance(value, set) else map(str, parts))
        opening, closing = "[]" if isinstance(value, list) else "()" if isinstance(value, tuple) else "{}"
        return f"{opening}{inner}{',' if isinstance(value, tuple) and len(value) == 1 else ''}{closing}"
    is_plain = is_text or is_several or value is None or type(value) in (bool, int)
    return repr(value) if is_plain or (type(value) is float and abs(value) < float("inf")) else None


def _items(value: Any) -> list[Any]:
    return list(value.items()) if isinstance(value, dict) else list(value)


def _pair(key: Any, value: Any) -> str | None:
    parts = [_written(key), _written(value)]
    return None if None in parts else ": ".join(map(str, parts))


def _kind(value: Any) -> str:
    if isinstance(value, ModuleType):
        return f"a module {value.__name__} that cannot be imported"
    is_plain = isinstance(value, str | bytes | int | float | list | tuple | set | dict)
    return f"a {type(value).__name__}{' that is too large or holds more than plain data' if is_plain else ''}"
