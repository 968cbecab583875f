"""Files of Python, which nothing here runs: their names as modules, their text, and the names that they bind."""

import ast
import io
import keyword
import os
import re
import sys
import tokenize
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TypeGuard

from raytorch.system.regular_files import open_regular

LARGEST = 2**20
"""Bytes of a file at most."""
TAKEN = frozenset(sys.stdlib_module_names | {"__main__", "numpy", "ray", "raytorch", "torch"})
"""Names of modules that no file of a project may hide."""

Binding = ast.stmt | ast.Name
"""What gives a name its value: a definition, an import, or the name itself where a value is assigned to it."""


class ProjectError(ValueError):
    """A project's code cannot be used. The message is one sentence; who catches it says where the code was named."""


def module_name(file: str) -> str:
    """The name by which a file or folder is imported from the project's root.

    What is no name in Python is made one, which no other file has: TorchScript, for one, takes no others.

    Example:
        >>> module_name("nets/tagger.py"), module_name("nets/__init__.py"), module_name("my-nets/tagger.py")
        ('nets.tagger', 'nets', 'my_2d_nets.tagger')
    """
    return ".".join(map(_as_name, file.removesuffix(".py").removesuffix("/__init__").split("/")))


def _as_name(part: str) -> str:
    if keyword.iskeyword(part):
        return f"{part}_"
    if not part or part.isidentifier():
        return part
    name = re.sub(r"\W", lambda found: f"_{ord(found[0]):x}_", part)
    return name if name.isidentifier() else f"_{name}"


def is_taken(module: str) -> bool:
    """Tell whether a module is Python's own, or one that raytorch itself needs: a project cannot have its name."""
    return module.partition(".")[0] in TAKEN


def read_source(path: Path, name: str) -> str:
    """The text of a file that is called ``name`` in messages, without a byte order mark and with line feeds alone.

    Raises ProjectError for what cannot be read, is no file, is too large, or is not UTF-8.
    """
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            raw = file.read(LARGEST + 1)
    except OSError as error:
        raise ProjectError(f"{name} cannot be read: {error.strerror}") from None
    if len(raw) > LARGEST:
        raise ProjectError(f"{name} has more than {LARGEST:,} bytes; move what is data into a file of its own")
    return _decoded(raw, name)


def _decoded(raw: bytes, name: str) -> str:
    try:
        text = raw.decode("utf-8-sig")
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ProjectError(f"{name}:{line}: not UTF-8; save the file as UTF-8") from None
    except SyntaxError as error:  # a coding line that names no encoding, or another one than the byte order mark
        raise ProjectError(f"{name}: {error.msg}; remove the coding line, as the file is UTF-8") from None
    if encoding not in ("utf-8", "utf-8-sig"):
        raise ProjectError(f"{name} has a coding line for {encoding}; save the file as UTF-8 and remove that line")
    return io.IncrementalNewlineDecoder(None, translate=True).decode(text, final=True)


def parse_source(text: str, name: str) -> ast.Module:
    """The syntax tree of a file's text. Raises ProjectError, with the line, where it is not valid Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # which are shown when the file is imported
            tree = ast.parse(text, name)
            compile(tree, name, "exec", dont_inherit=True)  # refuses more: a ``return`` outside a function, say
    except SyntaxError as error:
        raise ProjectError(f"{name}:{error.lineno or 1}: not valid Python: {error.msg}") from None
    except ValueError as error:  # a null character
        raise ProjectError(f"{name}: not valid Python: {error}") from None
    except (RecursionError, MemoryError):
        raise ProjectError(f"{name}: an expression or block is nested too deeply for Python") from None
    return tree


def bindings(body: Iterable[ast.stmt]) -> dict[str, list[Binding]]:
    """What binds each name at the top of a module or class, also in branches there.

    An ``@overload`` does not, nor what is below ``if __name__ == "__main__":``, as a module that is imported has not.
    """
    found: dict[str, list[Binding]] = {}
    waiting: list[ast.AST] = list(reversed([*body]))
    while waiting:
        node = waiting.pop()
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                if not _is_overload(node):
                    found.setdefault(node.name, []).append(node)
            case ast.Import() | ast.ImportFrom():
                for alias in node.names:
                    found.setdefault(alias.asname or alias.name.partition(".")[0], []).append(node)
            case ast.Name(id=name, ctx=ast.Store()):
                found.setdefault(name, []).append(node)
            case ast.AnnAssign(value=None) | ast.Lambda() | ast.comprehension():
                pass  # binds nothing, or in a scope of its own
            case _:
                inside = node.orelse if is_main_guard(node) else [*ast.iter_child_nodes(node)]
                waiting += reversed(inside)
    return found


def is_main_guard(statement: ast.AST) -> TypeGuard[ast.If]:
    """Tell whether it is an ``if __name__ == "__main__":``."""
    match statement:
        case ast.If(test=ast.Compare(left=one, ops=[ast.Eq()], comparators=[other])):
            return {ast.unparse(one), ast.unparse(other)} == {"__name__", "'__main__'"}
    return False


def _is_overload(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
    return any(
        isinstance(decorator, ast.Name | ast.Attribute) and _last(decorator) == "overload"
        for decorator in node.decorator_list
    )


def _last(name: ast.Name | ast.Attribute) -> str:
    return name.id if isinstance(name, ast.Name) else name.attr
