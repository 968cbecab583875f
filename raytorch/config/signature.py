"""What a class or function of a user's own takes, read off its source code without running it."""

import ast
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Literal

from raytorch.config.annotations import Names, simple_type
from raytorch.system.python_files import ProjectError, bindings, parse_source

Function = ast.FunctionDef | ast.AsyncFunctionDef
Kind = Literal["positional_only", "positional", "keyword"]


class Default(Enum):
    """In place of a parameter's default: there is none, or it is known only when the code runs."""

    REQUIRED = "required"
    UNKNOWN = "unknown"


REQUIRED = Default.REQUIRED
UNKNOWN = Default.UNKNOWN

_PLAIN_BASES = {
    "object",
    "abc.ABC",
    "typing.Generic",
    "typing.Protocol",
    "torch.nn.Module",
    "torch.nn.modules.Module",
    "torch.nn.modules.module.Module",
    "torch.utils.data.Dataset",
    "torch.utils.data.IterableDataset",
    "torch.utils.data.dataset.Dataset",
    "torch.utils.data.dataset.IterableDataset",
}
"""Classes that need no arguments."""
_HARMLESS = {"eq", "frozen", "order", "repr", "slots", "unsafe_hash"}
"""Options of a dataclass that leave its parameters as they are."""


@dataclass(frozen=True)
class Parameter:
    """A parameter of a class or function.

    Attributes:
        name: Its name.
        kind: How it may be given: by position alone, by position or keyword, or by keyword alone.
        default: A value as JSON and YAML have them, or a tuple; ``REQUIRED``, or ``UNKNOWN`` of what is no literal.
        annotation: The type to check, if it is a simple one.
        line: Its line in the file.
    """

    name: str
    kind: Kind
    default: Any
    annotation: Any
    line: int


@dataclass(frozen=True)
class Signature:
    """What a class or function takes, without ``self``, and the line on which that is written.

    Attributes:
        parameters: Those that have names.
        line: The line.
        any_more: Whether it takes any number of further arguments by position.
        is_class: Whether it is of a class.
    """

    parameters: tuple[Parameter, ...]
    line: int
    any_more: bool = False
    is_class: bool = False

    @property
    def by_position(self) -> list[str]:
        """Names of the parameters that can be given by position."""
        return [parameter.name for parameter in self.parameters if parameter.kind != "keyword"]


def signature_of(source: str, name: str) -> Signature | None:
    """What ``name`` takes, as the text of its file has it; None if that cannot be told before the code runs.

    Raises ProjectError where it takes ``**kwargs``, or the text is not valid Python.

    Example:
        >>> [parameter.name for parameter in signature_of("def net(width: int = 8): ...", "net").parameters]
        ['width']
    """
    try:
        return _File(source, name).signature(name)
    except RecursionError:
        raise ProjectError(f"the file of {name}: an expression is nested too deeply to be read") from None


class _File:
    def __init__(self, source: str, name: str) -> None:
        self._bound = bindings(parse_source(source, f"the file of {name}").body)
        self._names = Names(self._bound)

    def signature(self, name: str) -> Signature | None:
        found = self._definition(name)
        if isinstance(found, ast.ClassDef):
            of_class = self._of_class(found)
            return of_class and replace(of_class, is_class=True)
        return self._of_function(found, found.name, bound=False) if found else None

    def _definition(self, name: str) -> ast.ClassDef | Function | None:
        match self._bound.get(name):
            case [ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef() as only]:
                return only
        return None

    def _of_class(self, defined: ast.ClassDef) -> Signature | None:
        """Of the first class that says so, from ``defined`` on, as long as each has one base that might."""
        seen: set[str] = set()
        while defined.name not in seen:
            seen.add(defined.name)
            members = bindings(defined.body)
            match members.get("__init__"):
                case [ast.FunctionDef() as method]:
                    return self._of_function(method, f"{defined.name}.__init__", bound=True)
                case [*_]:
                    return None
            if "__new__" in members or defined.keywords:
                return None
            bases = [base for base in defined.bases if self._names.full(base) not in _PLAIN_BASES]
            if defined.decorator_list:
                return None if bases else self._of_dataclass(defined)
            if not bases:
                return Signature((), defined.lineno)
            above = self._definition(bases[0].id) if len(bases) == 1 and isinstance(bases[0], ast.Name) else None
            if not isinstance(above, ast.ClassDef):
                return None
            defined = above
        return None

    def _of_function(self, function: Function, name: str, *, bound: bool) -> Signature:
        taken = function.args
        if taken.kwarg:
            raise ProjectError(
                f"{name} takes **{taken.kwarg.arg} (line {taken.kwarg.lineno}), so that a misspelt key could not be "
                "told; name its parameters one by one"
            )
        own = int(bound and bool(taken.posonlyargs or taken.args))  # ``self``
        return Signature(tuple(self._parameters(taken))[own:], function.lineno, any_more=taken.vararg is not None)

    def _parameters(self, taken: ast.arguments) -> Iterator[Parameter]:
        places = [*taken.posonlyargs, *taken.args]
        defaults = [None] * (len(places) - len(taken.defaults)) + taken.defaults
        for place, default in zip(places, defaults, strict=True):
            only = place in taken.posonlyargs or place.arg.startswith("__")  # as it was written before there was a /
            yield self._parameter(place, "positional_only" if only else "positional", default)
        for keyword, given in zip(taken.kwonlyargs, taken.kw_defaults, strict=True):
            yield self._parameter(keyword, "keyword", given)

    def _parameter(self, given: ast.arg, kind: Kind, default: ast.expr | None) -> Parameter:
        return Parameter(given.arg, kind, _default(default), simple_type(given.annotation, self._names), given.lineno)

    def _of_dataclass(self, defined: ast.ClassDef) -> Signature | None:
        """Its annotated fields, unless a decorator, an option or a field says more than types and defaults."""
        decorators = [each.func if isinstance(each, ast.Call) else each for each in defined.decorator_list]
        options = [each.arg for call in defined.decorator_list if isinstance(call, ast.Call) for each in call.keywords]
        fields = [each for each in defined.body if isinstance(each, ast.AnnAssign) and not _is_class_variable(each)]
        is_plain = [self._names.full(each) for each in decorators] == ["dataclasses.dataclass"]
        if not is_plain or not _HARMLESS.issuperset(options) or any(self._says_more(each) for each in fields):
            return None
        return Signature(tuple(self._field(each) for each in fields), defined.lineno)

    def _field(self, field: ast.AnnAssign) -> Parameter:
        assert isinstance(field.target, ast.Name)
        kind = simple_type(field.annotation, self._names)
        return Parameter(field.target.id, "positional", _default(field.value), kind, field.lineno)

    def _says_more(self, field: ast.AnnAssign) -> bool:
        full = self._names.full(field.annotation)
        makes = field.value.func if isinstance(field.value, ast.Call) else None
        options = [each.arg for each in field.value.keywords] if isinstance(field.value, ast.Call) else []
        is_field = makes is not None and self._names.full(makes) == "dataclasses.field"
        return (
            not isinstance(field.target, ast.Name)
            or full in ("dataclasses.KW_ONLY", "dataclasses.InitVar")
            or (is_field and options not in (["default"], ["default_factory"]))
        )


def _is_class_variable(field: ast.AnnAssign) -> bool:
    return "ClassVar" in ast.unparse(field.annotation)  # in quotes, too


def _default(node: ast.expr | None) -> Any:
    if node is None:
        return REQUIRED
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return UNKNOWN
    return value if is_json(value) else UNKNOWN


def is_json(value: Any) -> bool:
    """Tell whether JSON has the value, if for tuples it has lists."""
    match value:
        case None | bool() | int() | str():
            return True
        case float():
            return math.isfinite(value)
        case list() | tuple():
            return all(map(is_json, value))
        case dict():
            return all(isinstance(key, str) and is_json(inner) for key, inner in value.items())
    return False
