"""YAML as a tree of PyYAML's nodes, in which each key and value knows the file and line, or the override, it is of."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError
from yaml.reader import ReaderError

from raytorch.errors import ConfigError
from raytorch.system.safe_text import escaped_line

Key = tuple[str | int, ...]
"""A dotted key taken apart; a number is a place in a list."""

OVERRIDE = "override "
"""Beginning of the name of a text from the command line; the name of any other is its file."""
DICTIONARY = "the configuration"
"""Name of one that was given in Python: no file, and without lines."""

TAG = "tag:yaml.org,2002:"
PLAIN = [TAG + kind for kind in ("null", "bool", "int", "float", "str", "seq", "map")]
NULL, BOOL, INT, FLOAT, STR, SEQ, MAP = PLAIN
MERGE = TAG + "merge"

LARGEST = 1 << 20
"""Bytes of a document at most."""
MOST_NODES = 10_000
"""Keys, values, lists and mappings of a document at most, those that aliases repeat counted each time."""
DEEPEST = 50
"""Lists and mappings inside each other at most."""
MOST_PROBLEMS = 20
"""Problems that one error tells at most."""


class Problem(NamedTuple):
    """A mistake in a key or its value, and where that stands."""

    mark: yaml.Mark
    path: Key
    text: str


class Location(NamedTuple):
    """How far a key could be followed: ``path`` leads to ``node``, ``rest`` is not there."""

    path: Key
    mark: yaml.Mark
    node: yaml.Node
    rest: Key


def compose(text: str, name: str, path: Key = ()) -> yaml.Node | None:
    """Build the tree of a YAML document, None if it is empty. Raises ConfigError, for a key that is given twice, too.

    Every mark in it carries ``name``, the file or the override; ``path`` is where it belongs in the run.
    """
    check_size(len(text.encode(errors="surrogatepass")), name)
    with _syntax_errors(text, name):
        loader = _Loader(text, name)
        root = loader.get_single_node()
        if root and _expanded(root, {}) > MOST_NODES:
            message = f"aliases repeat more than {MOST_NODES:,} keys and values"
            raise ComposerError(None, None, message, root.start_mark)
        problems = list(loader.settle(root, path)) if root else []
    if problems:
        raise report(problems)
    return root


def construct(root: yaml.Node) -> Any:
    """The plain data that a tree stands for. Raises ConfigError for any other tag, and a value that misfits its tag."""
    with _syntax_errors("", root.start_mark.name):
        return _Loader("", root.start_mark.name).construct_document(root)


def dump(data: Any) -> str:
    """Write plain data, keys in their order, as YAML that reads back as the same data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def check_size(size: int, name: str) -> None:
    """Refuse a document of more than :data:`LARGEST` bytes. Raises ConfigError."""
    if size > LARGEST:
        raise invalid(f"{name}: larger than {LARGEST:,} bytes, and so no configuration")


def report(problems: Sequence[Problem], untold: int = 0) -> ConfigError:
    """The error for ``problems``, one line each: those of the file in its order, then those of overrides.

    More than :data:`MOST_PROBLEMS` are counted, with the ``untold`` that the caller has left out.
    """
    ordered = sorted(problems, key=lambda problem: (is_override(problem.mark), problem.mark.line))
    told, untold = ordered[:MOST_PROBLEMS], untold + len(ordered[MOST_PROBLEMS:])
    lines = [": ".join(filter(None, (at(mark), dotted(path), text))) for mark, path, text in told]
    return invalid(*lines, *([f"and {untold:,} more"] if untold else []))


def invalid(*lines: str) -> ConfigError:
    """The error with ``lines``, each kept to one line whatever it quotes."""
    return ConfigError("\n".join(dict.fromkeys(map(escaped_line, lines))))


# -- the tree ----------------------------------------------------------------------------------------------------------


def find(root: yaml.Node, path: Key) -> Location:
    """Follow ``path`` as far as it goes; in ``optimizer: adam``, ``optimizer.name`` leads to ``optimizer``."""
    location = Location((), root.start_mark, root, path)
    while location.rest and (step := _step(location)):
        location = step
    return location


def _step(location: Location) -> Location | None:
    (part, *rest), node = location.rest, location.node
    if isinstance(node, yaml.MappingNode) and (found := pair(node, part)):
        return Location((*location.path, part), found[0].start_mark, found[1], tuple(rest))
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int):
        return Location((*location.path, part), node.value[part].start_mark, node.value[part], tuple(rest))
    return location._replace(rest=tuple(rest)) if part == "name" and node.tag == STR else None


def pair(mapping: yaml.MappingNode, key: str | int) -> tuple[yaml.ScalarNode, yaml.Node] | None:
    """The nodes of ``key`` and of its value."""
    return next((pair for pair in mapping.value if pair[0].value == key), None)


def put(mapping: yaml.MappingNode, key: yaml.ScalarNode, value: yaml.Node) -> None:
    """Add ``key``, or replace what is there."""
    mapping.value = [pair for pair in mapping.value if pair[0].value != key.value] + [(key, value)]


def scalar(value: str, mark: yaml.Mark, tag: str = STR) -> yaml.ScalarNode:
    """A node for a text."""
    return yaml.ScalarNode(tag, value, mark, mark)


def mark_at(name: str, line: int = 0, column: int = 0) -> yaml.Mark:
    """A place in the text ``name``; both numbers count from 0."""
    return yaml.Mark(name, 0, line, column, None, 0)


def is_override(mark: yaml.Mark) -> bool:
    """Tell whether a mark belongs to the command line rather than to a file."""
    return mark.name.startswith(OVERRIDE)


def at(mark: yaml.Mark, column: bool = False) -> str:
    """A mark as the start of a message: ``FILE:LINE``, or what has no lines."""
    if is_override(mark) or mark.name == DICTIONARY:
        return mark.name
    return f"{mark.name}:{mark.line + 1}" + (f":{mark.column + 1}" if column else "")


def dotted(path: Key) -> str:
    """``('model', 'hidden', 0)`` as ``model.hidden[0]``."""
    plain = re.compile(r"[\w-]+")
    parts = (
        f"[{part}]" if isinstance(part, int) else f".{part if plain.fullmatch(part) else repr(part)}" for part in path
    )
    return "".join(parts).removeprefix(".")


def show(node: yaml.Node) -> str:
    """A value as its author wrote it, shortened."""
    if isinstance(node, yaml.MappingNode):
        return "a mapping" if node.value else "an empty mapping"
    if isinstance(node, yaml.SequenceNode):
        return f"a list of {len(node.value)}"
    text = node.value if len(node.value) <= 60 else f"{node.value[:60]}..."
    if node.tag == STR:
        return repr(text)
    return {NULL: "null", BOOL: f"the boolean {text}"}.get(node.tag, text)


# -- PyYAML ------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader for plain data of YAML 1.2's core schema; a date is text, any other tag is refused."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self.name = name  # of every mark
        self._settled: set[yaml.Node] = set()
        self._depth = self._nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._nodes += 1
        self._depth += 1
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        if self._nodes > MOST_NODES:
            raise ComposerError(None, None, f"more than {MOST_NODES:,} keys and values", mark)
        if self._depth > DEEPEST:
            raise ComposerError(None, None, "nested too deeply", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if node.tag == INT:
                str(value)  # a hexadecimal number can be read with more digits than Python prints
        except (ValueError, LookupError):  # '!!int x', say, or a number of 5,000 digits
            message = f"{show(node)} is not a valid {node.tag.removeprefix(TAG)}"
            raise ConstructorError(None, None, message, node.start_mark) from None
        return value

    def settle(self, node: yaml.Node, path: Key) -> Iterator[Problem]:
        """Carry out merge keys (``<<``) from ``node`` on down, and yield what is wrong with any key."""
        if node in self._settled:  # through an alias, which may even stand inside what it repeats
            return
        self._settled.add(node)
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                yield from self.settle(item, (*path, index))
        elif isinstance(node, yaml.MappingNode):
            yield from _check_keys(node, path)
            for key, value in node.value:
                yield from self.settle(value, (*path, key.value))
            self.flatten_mapping(node)
            node.value = list({key.value: (key, value) for key, value in node.value}.values())


def _check_keys(mapping: yaml.MappingNode, path: Key) -> Iterator[Problem]:
    """Yield a problem for each key that is not text or was there before, and drop the former."""
    first: dict[str, yaml.Mark] = {}
    for key, _ in mapping.value:
        mark = key.start_mark
        if key.tag == MERGE:
            continue
        if key.tag != STR or not key.value.isprintable():
            yield Problem(mark, path, f"a key must be plain text, not {show(key)}")
        elif key.value in first:
            yield Problem(mark, (*path, key.value), f"duplicate key, first given on line {first[key.value].line + 1}")
        else:
            first[key.value] = mark
    mapping.value = [(key, value) for key, value in mapping.value if isinstance(key, yaml.ScalarNode)]


def _refuse_tag(loader: _Loader, node: yaml.Node) -> None:
    tag = node.tag.replace(TAG, "!!")
    raise ConstructorError(None, None, f"the tag {tag} is not supported; write plain values", node.start_mark)


def _expanded(node: yaml.Node, sizes: dict[yaml.Node, int]) -> int:
    """Nodes below and with ``node`` when each alias stands for a copy; one inside what it repeats counts once."""
    if node not in sizes:
        children = () if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            children = chain.from_iterable(children)
        sizes[node] = 1
        sizes[node] += sum(_expanded(child, sizes) for child in children)
    return sizes[node]


class _Dumper(yaml.SafeDumper):
    """Quotes text that a loader of YAML 1.1 or 1.2 would take for something else, and keeps a list on one line."""


_CORE: dict[str, tuple[str, str]] = {
    NULL: (r"~|null|Null|NULL|", "~nN"),
    BOOL: (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    INT: (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    FLOAT: (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    MERGE: (r"<<", "<"),
}
"""How YAML 1.2's core schema writes each kind of plain scalar, and with what it begins; merge keys are YAML 1.1's."""


def _constructor(tag: str, make: Callable[[str], Any]) -> Callable[[_Loader, Any], Any]:
    """The function that reads the scalars of a tag, which may also be written out: ``!!int 3``."""

    def construct(loader: _Loader, node: yaml.ScalarNode) -> Any:
        text = loader.construct_scalar(node)
        if not re.fullmatch(_CORE[tag][0], text):
            raise ValueError(text)
        return make(text)

    return construct


def _float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


_Loader.yaml_constructors = {tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag in PLAIN}
_Loader.add_constructor(None, _refuse_tag)
_Loader.add_constructor(BOOL, _constructor(BOOL, lambda text: text.lower() == "true"))
_Loader.add_constructor(INT, _constructor(INT, lambda text: int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))))
_Loader.add_constructor(FLOAT, _constructor(FLOAT, _float))
_Loader.yaml_implicit_resolvers = {}
for _tag, (_form, _first) in _CORE.items():
    _Loader.add_implicit_resolver(_tag, re.compile(rf"(?:{_form})\Z"), [*_first, *([""] if _tag == NULL else [])])
    _Dumper.add_implicit_resolver(_tag, re.compile(rf"(?:{_form})\Z"), list(_first))
_Dumper.add_representer(list, lambda dumper, items: dumper.represent_sequence(SEQ, items, flow_style=True))


@contextmanager
def _syntax_errors(text: str, name: str) -> Iterator[None]:
    """Put what PyYAML raises into one line."""
    try:
        yield
    except yaml.MarkedYAMLError as error:
        where = at(error.problem_mark or mark_at(name), column=True)
        what = ", ".join(filter(None, (error.context, error.problem)))
    except ReaderError as error:
        before = text[: error.position]
        where = at(mark_at(name, before.count("\n"), len(before) - before.rfind("\n") - 1), column=True)
        what = f"the character {text[error.position]!r} is not allowed"
    else:
        return
    raise invalid(f"{where}: not valid YAML: {what}") from None
