"""Sources of what a notebook or a prompt has defined, as the standard library's ``linecache`` and IPython keep them."""

import ast
import inspect
import linecache
import os
import sys
import textwrap
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any

from raytorch.config.interactive_code import first_line
from raytorch.system.python_files import ProjectError, parse_source


def is_of_session(file: str) -> bool:
    """Tell whether a code's file is no file, but a cell or a line at a prompt."""
    return not os.path.isfile(file)  # noqa: PTH113 - which says no for what may not be asked


def code_of(value: Any) -> CodeType | None:
    """The code of a function, or that of a method which a class has been given where it was defined."""
    value = inspect.unwrap(value)
    function = value if isinstance(value, FunctionType) else next(_methods(value), None)
    return function.__code__ if function else None


def namespace_of(value: Any) -> Mapping[str, Any]:
    """The global names of the code of a class or function."""
    value = inspect.unwrap(value)
    function = value if isinstance(value, FunctionType) else next(_methods(value), None)
    if function:
        return function.__globals__
    return vars(sys.modules[value.__module__]) if value.__module__ in sys.modules else {}


def method_set_later(value: type, text: str) -> str | None:
    """The name of a method that a class has of the session but not by its ``text``, if there is one."""
    [definition] = (node for node in parse_source(text, value.__name__).body if isinstance(node, ast.ClassDef))
    methods = {each.name: each for each in definition.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)}
    assigned = {
        node.id
        for each in definition.body
        if isinstance(each, ast.Assign | ast.AnnAssign)
        for node in ast.walk(each)
        if isinstance(node, ast.Name)
    }
    for name, member in _functions(value):
        method = methods.get(name)
        if method:
            is_in_text = bool(method.decorator_list) or member.__qualname__ == f"{value.__qualname__}.{name}"
        else:
            is_in_text = name in assigned or bool(definition.decorator_list)  # which may have given it
        if not is_in_text:
            return name
    return None


def _methods(value: Any) -> Iterator[FunctionType]:
    for _, member in _functions(value):
        if member.__qualname__.startswith(f"{value.__qualname__}."):
            yield member


def _functions(value: Any) -> Iterator[tuple[str, FunctionType]]:
    """Those of a class that are written where it is, by name."""
    for name, member in vars(value).items() if isinstance(value, type) else ():
        member = getattr(member, "fget", getattr(member, "__func__", member))  # of a property, of a static method
        if not isinstance(member, FunctionType) or member.__code__.co_filename == "<string>":  # as of a dataclass
            continue
        if member.__globals__.get("__name__") == value.__module__:
            yield name, member


def source_of(value: Any) -> str:
    """The text of the definition of a class or function. Raises ProjectError if it is kept nowhere."""
    value, code = inspect.unwrap(value), code_of(value)
    for text in _texts(value, code):
        found = _found(text, value.__name__, code.co_firstlineno if code else None)
        if found is not None:
            return found
    raise ProjectError(
        f"the source of {value.__name__} is kept nowhere, as it was not defined in a file or a notebook's cell; move "
        "it into a file"
    )


def _texts(value: Any, code: CodeType | None) -> Iterator[str]:
    """The texts that may have a definition: of its code, else of a class without methods the newest cells first."""
    if code:
        yield "".join(linecache.getlines(code.co_filename))
        return
    cells = namespace_of(value).get("In")  # as IPython keeps them
    yield from (text for text in reversed(cells if isinstance(cells, list) else []) if isinstance(text, str))
    files = [file for file in linecache.cache if is_of_session(file)]
    yield from ("".join(linecache.getlines(file)) for file in reversed(files))


def _found(text: str, name: str, line: int | None) -> str | None:
    """The newest definition of that name in a text, around that line if there is one."""
    try:
        tree = parse_source(text, name)
    except ProjectError:  # a cell that has failed
        return None
    found = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and node.name == name
        and (line is None or first_line(node) <= line <= (node.end_lineno or 0))
    ]
    if not found:
        return None
    return textwrap.dedent("\n".join(text.split("\n")[first_line(found[-1]) - 1 : found[-1].end_lineno]))
