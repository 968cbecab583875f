"""Code of a notebook or a prompt as the text of a file: definitions, each with what it needs, in an order that runs."""

import ast
import symtable
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from heapq import heappop, heappush
from itertools import pairwise

from raytorch.system.python_files import ProjectError, parse_source

FILE = "interactive.py"
"""Name of the file, beside where the session runs."""
FUTURE = "__future__"
HEADER = "# What a run uses of a notebook or a prompt, as raytorch has put it together.\n"
_AT_ONCE = ("listcomp", "setcomp", "dictcomp", "genexpr")
"""Scopes that the symbol table takes for functions, and that are run where they stand."""


@dataclass(frozen=True)
class Definition:
    """A statement that gives a name its value.

    Attributes:
        text: The statement.
        now: The global names that have to be there when it is run, ``a.b`` of what is in modules.
        later: Those that its functions use when they are called.
        called: Those of ``now`` that are functions which it calls.
    """

    text: str
    now: frozenset[str]
    later: frozenset[str]
    called: frozenset[str]

    @property
    def names(self) -> frozenset[str]:
        """All that it uses."""
        return self.now | self.later

    @property
    def rank(self) -> int:
        """Its place among those that could come next: imports first, then values, then code."""
        kinds: tuple[tuple[str, ...], ...] = (("from __future__ ",), ("import ", "from "))
        first = next((rank for rank, kind in enumerate(kinds) if self.text.startswith(kind)), len(kinds))
        return first if "\n" not in self.text else len(kinds) + 1


def definition(text: str) -> Definition:
    """What a statement at the top level needs. Raises ProjectError if it is not valid Python.

    Example:
        >>> sorted(definition("def area(r): return math.pi * square(r)").later)
        ['math', 'math.pi', 'square']
    """
    text = text.strip("\n")
    tree = parse_source(text, FILE)
    now: set[str] = set()
    later: set[str] = set()
    _read(symtable.symtable(text, FILE, "exec"), now, later, is_later=False)
    dotted = {each for node in ast.walk(tree) for each in _dotted(node)}
    decorators = [each for node in ast.walk(tree) for each in getattr(node, "decorator_list", ())]
    called = {node.id for each in decorators for node in ast.walk(each) if isinstance(node, ast.Name)}
    return Definition(text, _with(now, dotted), _with(later, dotted), frozenset(called & now))


def _read(scope: symtable.SymbolTable, now: set[str], later: set[str], *, is_later: bool) -> None:
    """Sort the global names that a scope reads into ``now`` and ``later``."""
    found = later if is_later else now
    is_top = scope.get_type() == "module"
    found |= {each.get_name() for each in scope.get_symbols() if each.is_referenced() and (is_top or each.is_global())}
    for inner in scope.get_children():
        _read(inner, now, later, is_later=is_later or _is_function(inner))


def _is_function(scope: symtable.SymbolTable) -> bool:
    return scope.get_type() == "function" and scope.get_name() not in _AT_ONCE


def _dotted(node: ast.AST) -> Iterator[str]:
    """``a.b`` and ``a.b.c`` of an attribute ``a.b.c``."""
    if isinstance(node, ast.Attribute):
        text = ast.unparse(node)
        if text.replace(".", "").isidentifier():
            yield text


def _with(names: set[str], dotted: Iterable[str]) -> frozenset[str]:
    return frozenset(names | {each for each in dotted if each.partition(".")[0] in names})


def assembled(definitions: Mapping[str, Definition]) -> str:
    """The text of a file with all of them. Their order does not depend on which others there are.

    Raises ProjectError where each of two definitions has to come before the other.
    """
    before = {name: _before(name, definitions) for name in definitions}
    order: list[str] = []
    ready: list[tuple[int, str]] = []
    sorter = TopologicalSorter(before)
    try:
        sorter.prepare()
    except CycleError as error:
        raise ProjectError(
            f"{' and '.join(sorted(set(error.args[1])))} need each other before they are there; move them into a file"
        ) from None
    while sorter.is_active():
        for name in sorter.get_ready():
            heappush(ready, (definitions[name].rank, name))
        order.append(heappop(ready)[1])
        sorter.done(order[-1])
    return _joined([definitions[name].text for name in order])


def _before(name: str, definitions: Mapping[str, Definition]) -> set[str]:
    """What has to stand above a definition: what it needs at once, and all that functions need which it calls."""
    found = definitions[name]
    called = needed(definitions, found.called & definitions.keys())
    return {each for each in found.now | called if each in definitions and each != name}


def needed(definitions: Mapping[str, Definition], names: Iterable[str]) -> set[str]:
    """The ``names``, and what they need of the ``definitions``, at any depth."""
    waiting, found = [*names], set()
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += definitions[name].names & definitions.keys()
    return found


def reduced(text: str, name: str) -> str:
    """The part of an assembled text that ``name`` needs, as it would be if it had been assembled for that alone.

    Any other text is left as it is, also an assembled one into which somebody has written something else.
    """
    body = parse_source(text, FILE).body if text.startswith(HEADER) else []
    named = [(_bound(statement), _source(statement, text)) for statement in body]
    names = [key for key, _ in named]
    if name not in names or None in names or len(set(names)) < len(names):
        return text
    definitions = {key: definition(source) for key, source in named if key}
    wanted = needed(definitions, {name} | (definitions.keys() & {FUTURE}))
    return _joined([source for key, source in named if key in wanted])


def _bound(statement: ast.stmt) -> str | None:
    """The one name that a statement of an assembled text binds, None of what is in no such text."""
    match statement:
        case ast.ImportFrom(module="__future__"):
            return FUTURE
        case ast.Import(names=[alias]) | ast.ImportFrom(names=[alias]):
            return alias.asname or alias.name
        case ast.Assign(targets=[ast.Name(id=name)]):
            return name
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return name
    return None


def _source(statement: ast.stmt, text: str) -> str:
    return "\n".join(text.split("\n")[first_line(statement) - 1 : statement.end_lineno])


def first_line(statement: ast.AST) -> int:
    """The line on which a statement begins, its decorators included."""
    decorators = getattr(statement, "decorator_list", [])
    return min(int(node.lineno) for node in (statement, *decorators))


def _joined(texts: list[str]) -> str:
    lines = [HEADER + texts[0]] if texts else [HEADER]
    for above, text in pairwise(texts):
        lines.append(text if "\n" not in above + text else f"\n\n{text}")
    return "\n".join(lines) + "\n"
