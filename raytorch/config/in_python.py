"""A configuration that is given in Python, where classes and functions stand for the references to them."""

import ast
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path, PurePath
from typing import Any

from pydantic import BaseModel

from raytorch.config import yaml_tree as tree
from raytorch.config.live_code import is_live, live_project
from raytorch.config.own_calls import makes_a_metric, require_arguments, require_loss
from raytorch.config.own_code import PARTS
from raytorch.config.own_parts import OwnLoss
from raytorch.config.project import Project
from raytorch.errors import ConfigError
from raytorch.system.python_files import ProjectError, parse_source, read_source


@dataclass
class LivePart:
    """A class or function that stands for a part.

    Attributes:
        key: The part's key, such as ``metrics[0]``.
        kind: The key of the run.
        value: The class or function.
        keys: What is said of it: its arguments, and keys of raytorch's.
    """

    key: str
    kind: str
    value: Callable[..., Any]
    keys: dict[str, Any]

    def require_arguments(self) -> None:
        """Refuse what it does not take, where that could not be read off its source. Raises ConfigError."""
        part = PARTS[self.kind]
        if part is OwnLoss:
            require_loss(self.key, self.value)
        arguments = sorted(self.keys.keys() - part.model_fields)
        makes = self.kind == "metrics" and makes_a_metric(self.value)
        require_arguments(self.key, self.value, arguments, 0 if makes else len(part.called_with), named_only=makes)


@dataclass
class PythonConfig:
    """The content of a configuration without classes and functions, and the project that these are of."""

    content: dict[str, Any]
    project: Project | None = None
    parts: list[LivePart] = field(default_factory=list)


def read_python(data: Mapping[str, Any], folder: Path) -> PythonConfig:
    """Put references in the place of classes and functions: of ``Net``, ``{"name": Net, "width": 8}`` and
    ``partial(Net, width=8)``. Raises ConfigError for those that cannot be referred to.

    Example:
        >>> read_python({"epochs": 1, "model": partial(Net, width=8)}, Path()).content["model"]
        {'name': 'nets.py:Net', 'width': 8}
    """
    content = dict(data)
    parts: list[LivePart] = []
    for kind in PARTS:
        listed = content.get(kind)
        if kind == "metrics" and _has_live(listed):
            raise _refused(kind, "must be a list, also of a single one: metrics=[...]")
        if isinstance(listed, list | tuple):
            parts += (part for at, each in enumerate(listed) for part in _parts(f"{kind}[{at}]", kind, each))
        elif kind in content:
            parts += _parts(kind, kind, listed)
    if not parts:
        return PythonConfig(content)
    project = _put_references(content, parts, folder)
    return PythonConfig(content, project, parts)


def _parts(key: str, kind: str, value: Any) -> Iterator[LivePart]:
    keys: dict[str, Any] = {}
    if isinstance(value, Mapping) and "name" in value:
        keys, value = {each: value[each] for each in value if each != "name"}, value["name"]
    if isinstance(value, partial):
        if value.args:
            raise _refused(key, f"give the arguments of {value.func.__name__} by their names")
        keys, value = {**value.keywords, **keys}, value.func
    if is_live(value):
        yield LivePart(key, kind, value, keys)
    elif not isinstance(value, str | Mapping | BaseModel | list | tuple | int | float | None):
        if kind == "loss" and callable(value):
            require_loss(key, type(value))
        name = type(value).__name__
        raise _refused(key, f'is an object of {name}; give the class, and its arguments: {{"name": {name}, ...}}')


def _has_live(value: Any) -> bool:
    """Tell whether a class or function stands in the place of a whole part."""
    named = value.get("name") if isinstance(value, Mapping) else value
    return is_live(named.func if isinstance(named, partial) else named)


def _put_references(content: dict[str, Any], parts: list[LivePart], folder: Path) -> Project:
    for part in parts:
        try:
            live_project([part.value], folder)
        except ProjectError as error:
            raise _refused(part.key, str(error)) from None
    try:
        project, references = live_project([part.value for part in parts], folder)
    except ProjectError as error:
        raise _refused("", str(error)) from None
    for part, reference in zip(parts, references, strict=True):
        named = {"name": str(reference), **part.keys}
        if part.key == part.kind:
            content[part.kind] = named
        else:
            listed = list(content[part.kind])
            listed[int(part.key.partition("[")[2][:-1])] = named
            content[part.kind] = listed
    return project


def _refused(key: str, message: str) -> ConfigError:
    return tree.invalid(": ".join(filter(None, (tree.DICTIONARY, key, message))))


def plain(data: Any) -> Any:
    """Data with sections as mappings, paths as texts, and with what NumPy and PyTorch have for numbers as Python's."""
    if isinstance(data, BaseModel):
        return data.model_dump(mode="json")
    if isinstance(data, Mapping):
        return {key: plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [plain(value) for value in data]
    if isinstance(data, PurePath):
        return str(data)
    return data.tolist() if hasattr(data, "tolist") else data


def no_data(data: Any, key: str = "") -> tuple[str, Any] | None:
    """The key and value of the first thing that is not of numbers, texts, lists and mappings; None if all is.

    Example:
        >>> no_data({"epochs": 1, "model": {"name": "mlp", "hidden": [set()]}})
        ('model.hidden[0]', set())
    """
    inside: Iterable[tuple[str, Any]] = ()
    if isinstance(data, Mapping):
        inside = ((f"{key}.{each}" if key else str(each), value) for each, value in data.items())
    elif isinstance(data, list | tuple):
        inside = ((f"{key}[{at}]", value) for at, value in enumerate(data))
    elif not isinstance(data, str | int | float | date | None):
        return key, data
    return next((found for each, value in inside if (found := no_data(value, each))), None)


def told_apart(key: str, value: Any) -> str:
    """Say that a configuration has nothing like ``value``, which stands at ``key``, and what it has."""
    if not is_live(value):
        return f"{key}: is {value!r:.99}, a {type(value).__name__}; give plain numbers, texts, lists and mappings"
    kind = "class" if isinstance(value, type) else "function"
    return (
        f"{key}: is the {kind} {value.__name__}; give plain numbers, texts, lists and mappings, such as its name: "
        f"classes and functions stand for {', '.join(PARTS)}, as in raytorch.train(model=Net)"
    )


def require_guard(sources: Mapping[str, str], root: Path, call: str) -> None:
    """Refuse to start workers that import the running script where it would make the same ``call`` again.

    Raises ConfigError, which names the line that has to be below ``if __name__ == "__main__":``.
    """
    main = sys.modules["__main__"]
    script = Path(getattr(main, "__file__", None) or "").resolve()
    if script not in {(root / file).resolve() for file in sources}:
        return
    frame = sys._getframe()
    while frame and not (frame.f_code.co_name == "<module>" and frame.f_globals is vars(main)):
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None or not script.is_file():
        return
    for statement in parse_source(read_source(script, script.name), script.name).body:
        if statement.lineno <= frame.f_lineno <= (statement.end_lineno or 0) and not _is_guard(statement):
            raise ConfigError(
                f"{script.name}:{frame.f_lineno}: each worker imports this file, and would call {call} again; put the "
                'call below if __name__ == "__main__":'
            )


def _is_guard(statement: ast.stmt) -> bool:
    names = (
        {node.id for node in ast.walk(statement.test) if isinstance(node, ast.Name)}
        if isinstance(statement, ast.If)
        else set()
    )
    return "__name__" in names
