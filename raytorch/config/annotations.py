"""Annotations in source code, as the types that pydantic checks; of what is not simple, nothing is checked."""

import ast
from collections.abc import Callable, Mapping, Sequence
from types import GenericAlias, NoneType
from typing import Annotated, Any, Literal, Union, get_origin

from pydantic import Strict

from raytorch.system.python_files import Binding

_TYPING = ("typing.", "typing_extensions.", "collections.abc.", "collections.")


class Names:
    """What the names in a file mean, by its imports."""

    def __init__(self, bound: Mapping[str, Sequence[Binding]]) -> None:
        self._bound = bound

    def full(self, name: ast.expr) -> str | None:
        """The full name of ``nn.Module``, say, or of ``Dataset[int]`` without its parameters; None of the file's own.

        A name that the file does not bind is one of Python's own.
        """
        match name:
            case ast.Subscript(value=generic):
                return self.full(generic)
            case ast.Attribute(value=above, attr=attribute):
                return f"{full}.{attribute}" if (full := self.full(above)) else None
            case ast.Name(id=first):
                found = self._bound.get(first, ())
                if not found:
                    return None if "*" in self._bound else first
                return _imported(first, found[0]) if len(found) == 1 else None
        return None


def _imported(name: str, binding: Binding) -> str | None:
    match binding:
        case ast.Import(names=aliases):
            return next((alias.name for alias in aliases if alias.asname == name), name)
        case ast.ImportFrom(module=str(module), names=aliases, level=0):
            original = next(alias.name for alias in aliases if (alias.asname or alias.name) == name)
            return f"{module}.{original}"
    return None


def simple_type(annotation: ast.expr | None, names: Names) -> Any:
    """The type that an annotation stands for, for pydantic to check in a strict section; None if it is not simple.

    Lists are taken for tuples and sequences, which YAML does not have.
    """
    match annotation:
        case ast.Constant(value=None):
            return NoneType
        case ast.Constant(value=str(text)):
            return simple_type(_expression(text), names)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _union([simple_type(left, names), simple_type(right, names)])
        case ast.Subscript(slice=inner):
            return _generic(_short(names.full(annotation)), inner, names)
        case ast.Name() | ast.Attribute():
            return _PLAIN.get(_short(names.full(annotation)))
    return None


def _expression(text: str) -> ast.expr | None:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _short(full: str | None) -> str:
    """The name without the module, of what several modules have; ``List`` is ``list``."""
    module = next((module for module in _TYPING if full and full.startswith(module)), "")
    name = (full or "").removeprefix(module)
    return name.lower() if name in ("List", "Tuple", "Dict") and module else name


def _union(kinds: Sequence[Any]) -> Any:
    several = [kind for kind in kinds if kind is not NoneType]
    if any(kind is None or (len(several) > 1 and get_origin(kind) is dict) for kind in kinds):
        return None  # also where a message could not tell the keys of a mapping from the variants
    return Union[tuple(kinds)]  # noqa: UP007 - made of values


def _generic(generic: str, inner: ast.expr, names: Names) -> Any:
    parameters = inner.elts if isinstance(inner, ast.Tuple) else [inner]
    if generic == "Literal":
        return _literal(parameters)
    of_any_length = generic == "tuple" and len(parameters) == 2 and _is_ellipsis(parameters[1])
    kinds = [simple_type(each, names) for each in (parameters[:1] if of_any_length else parameters)]
    if not kinds or any(kind is None for kind in kinds):
        return None
    if generic == "tuple":
        return _lax(GenericAlias(tuple, (*kinds, ...) if of_any_length else tuple(kinds)))
    if generic == "Union":
        return _union(kinds)
    if generic == "dict" and kinds[:-1] == [str]:
        return GenericAlias(dict, tuple(kinds))
    return _OF_ONE[generic](kinds[0]) if generic in _OF_ONE and len(kinds) == 1 else None


def _literal(values: Sequence[ast.expr]) -> Any:
    constants = [each.value for each in values if isinstance(each, ast.Constant)]
    if len(constants) < len(values) or not all(isinstance(each, str | int | None) for each in constants):
        return None
    given = tuple(each for each in constants if each is not None)
    kinds = ([Literal[given]] if given else []) + ([NoneType] if len(given) < len(constants) else [])
    return _union(kinds)


def _is_ellipsis(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is ...


def _lax(kind: Any) -> Any:
    return Annotated[kind, Strict(False)]


_OF_ONE: dict[str, Callable[[Any], Any]] = {
    "Optional": lambda kind: _union([kind, NoneType]),
    "Sequence": lambda kind: _lax(GenericAlias(tuple, (kind, ...))),
    "list": lambda kind: GenericAlias(list, (kind,)),
}
_PLAIN: dict[str, Any] = {
    "int": int,
    "float": float,
    "bool": bool,
    "str": str,
    "list": list[Any],
    "Sequence": _lax(tuple[Any, ...]),
    "tuple": _lax(tuple[Any, ...]),
    "dict": dict[str, Any],
}
