"""A run's YAML file: read, override, check and write it; each problem is one line that says where and what is allowed.

PyYAML's node tree knows the file and line of every key and value. Overrides are grafted into it, so that one tree tells
where a value that pydantic refuses came from. What is allowed instead is read off the JSON schema.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from yaml.constructor import ConstructorError
from yaml.reader import ReaderError

from raytorch.config import RunConfig
from raytorch.errors import ConfigError

Key = tuple[str | int, ...]
"""A dotted key taken apart; a number is a place in a list."""

Fragment = dict[str, Any]
"""A part of a JSON schema."""


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the run that a YAML file describes.

    An override is written ``KEY=VALUE``: a dotted key, and a value in YAML. It wins over the file and over overrides
    before it, and leaves the rest of its section as it is.

    Raises:
        ConfigError: the file or an override is invalid. Its message has one line for each problem, which starts with
            ``FILE:LINE: KEY:``, or with ``--set KEY=VALUE: KEY:`` where an override is to blame.
    """
    root = _compose(_read(path), str(path))
    if root is None:
        raise _invalid(f"{path}: the file is empty; give at least epochs or steps")
    if not isinstance(root, yaml.MappingNode):
        raise _invalid(f"{_at(root.start_mark)}: must be {_describe([schema()])}, not {_show(root)}")
    for override in overrides:
        _override(override, root)
    try:
        return RunConfig.model_validate(_construct(root))
    except ValidationError as error:
        raise _invalid(*_report(error, root)) from None


def dump(config: RunConfig) -> str:
    """Write a run in full, defaults included, as YAML that :func:`load` reads back to an equal run."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def schema() -> Fragment:
    """The JSON schema (draft 2020-12) of a run's file, by which editors complete and check it."""
    run = RunConfig.model_json_schema()
    definitions = run["$defs"]
    for section in definitions.values():
        # The name tells the variants of a section apart: Python code may leave it out, a file may not.
        if "const" in section["properties"].get("name", {}):
            section["required"] = ["name"]
    for section in run["properties"].values():
        if isinstance(section["default"], dict) and "name" in section["default"]:
            # As RunConfig does, accept ``optimizer: adam`` for ``optimizer: {name: adam}``.
            variants = section.pop("oneOf", None) or [{"$ref": section.pop("$ref")}]
            section.pop("discriminator", None)
            names = _names([_resolve(variant, definitions)["properties"]["name"] for variant in variants])
            section["anyOf"] = [{"enum": names}, *variants]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **run, "title": "raytorch run"}


# -- YAML --------------------------------------------------------------------------------------------------------------

_TAG = "tag:yaml.org,2002:"
_STR = _TAG + "str"
_MERGE = _TAG + "merge"
_PLAIN = {_STR, *(_TAG + kind for kind in ("null", "bool", "int", "float", "seq", "map"))}


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader for plain data: ``1e-3`` is a number, a date is text, any other tag is refused."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self.name = name  # what marks, and so messages, call the text
        self._settled: set[yaml.Node] = set()

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError):  # '!!int x', say, or a number of 5,000 digits
            message = f"{_show(node)} is not a valid {node.tag.removeprefix(_TAG)}"
            raise ConstructorError(None, None, message, node.start_mark) from None

    def settle(self, node: yaml.Node, path: Key = ()) -> Iterator[str]:
        """Carry out merge keys (``<<``) from ``node`` down, and yield a problem for each key repeated or not text."""
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


def _refuse_tag(loader: _Loader, node: yaml.Node) -> None:
    raise ConstructorError(None, None, f"the tag {node.tag!r} is not supported; write plain values", node.start_mark)


_Loader.yaml_constructors = {tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag in _PLAIN}
_Loader.add_constructor(None, _refuse_tag)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if tag in {*_PLAIN, _MERGE}]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# To YAML 1.1 a float has a point, and its exponent a sign; to YAML 1.2, and to people, 1e-3 is one too.
_Loader.add_implicit_resolver(
    _TAG + "float",
    re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+|\.[0-9]+(?:[eE][-+]?[0-9]+)?)\Z"),
    list("-+.0123456789"),
)


class _Dumper(yaml.SafeDumper):
    """Quotes text that :class:`_Loader` would take for something else; keeps a list on one line."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers
_Dumper.add_representer(list, lambda dumper, items: dumper.represent_sequence(_TAG + "seq", items, flow_style=True))


def _read(path: str | Path) -> str:
    try:
        raw = Path(path).read_bytes()
    except FileNotFoundError:
        raise _invalid(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: the path holds a null character
        raise _invalid(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _invalid(f"{path}:{line}: not UTF-8; save the file as UTF-8") from None


def _compose(text: str, name: str) -> yaml.Node | None:
    """The node tree of a YAML document, None if there is none; marks in it carry ``name``."""
    with _yaml_errors(text, name):
        loader = _Loader(text, name)
        node = loader.get_single_node()
        problems = list(loader.settle(node)) if node else []
    if problems:
        raise _invalid(*problems)
    return node


def _construct(root: yaml.Node) -> Any:
    with _yaml_errors("", root.start_mark.name):
        return _Loader("", root.start_mark.name).construct_document(root)


@contextmanager
def _yaml_errors(text: str, name: str) -> Iterator[None]:
    """Put what PyYAML raises into one line."""
    try:
        yield
    except yaml.MarkedYAMLError as error:
        where = _at(error.problem_mark or _mark(name), column=True)
        what = ", ".join(part for part in (error.context, error.problem) if part)
    except ReaderError as error:
        before = text[: error.position]
        where = _at(_mark(name, before.count("\n"), len(before) - before.rfind("\n") - 1), column=True)
        what = f"the character {text[error.position]!r} is not allowed"
    except RecursionError:
        where, what = name, "nested too deeply"
    else:
        return
    raise _invalid(f"{where}: not valid YAML: {what}")


def _check_keys(mapping: yaml.MappingNode, path: Key) -> Iterator[str]:
    first: dict[str, yaml.Mark] = {}
    for key, _ in mapping.value:
        if key.tag == _STR and key.value in first:
            line = first[key.value].line + 1
            yield f"{_at(key.start_mark)}: {_dotted((*path, key.value))}: duplicate key, first given on line {line}"
        elif key.tag == _STR:
            first[key.value] = key.start_mark
        elif key.tag != _MERGE:
            yield f"{_at(key.start_mark)}: {_dotted(path) or 'key'}: a key must be text, not {_show(key)}"
    mapping.value = [(key, value) for key, value in mapping.value if isinstance(key, yaml.ScalarNode)]


# -- overrides ---------------------------------------------------------------------------------------------------------

_OVERRIDE = "--set "


def _override(override: str, root: yaml.MappingNode) -> None:
    """Graft the value of ``optimizer.lr=0.01`` into the tree; marks in what is new carry the override."""
    name = _OVERRIDE + override
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise _invalid(f"{name}: must be KEY=VALUE, such as optimizer.lr=0.01")
    mark = _mark(name)
    value = _compose(text, name) or yaml.ScalarNode(_TAG + "null", "", mark, mark)
    mapping = root
    for key in keys[:-1]:
        field = RunConfig.model_fields.get(key) if mapping is root else None
        mapping = _open(mapping, _text(key, mark), default=getattr(field and field.default, "name", None))
    _put(mapping, _text(keys[-1], mark), value)


def _open(parent: yaml.MappingNode, key: yaml.ScalarNode, default: str | None) -> yaml.MappingNode:
    """Make the value of ``key`` a mapping to write into: a copy, since aliases may share what is there.

    A name that stands alone goes under ``name``, and so does ``default`` where nothing stands.
    """
    key, value = _pair(parent, key.value) or (key, None)
    if isinstance(value, yaml.ScalarNode) and value.tag == _STR:
        pairs = [(_text("name", value.start_mark), value)]
    elif isinstance(value, yaml.MappingNode):
        pairs = list(value.value)
    else:
        pairs = [(_text("name", key.start_mark), _text(default, key.start_mark))] if default else []
    mapping = yaml.MappingNode(_TAG + "map", pairs, key.start_mark, key.end_mark)
    _put(parent, key, mapping)
    return mapping


def _put(mapping: yaml.MappingNode, key: yaml.ScalarNode, value: yaml.Node) -> None:
    mapping.value = [pair for pair in mapping.value if pair[0].value != key.value] + [(key, value)]


def _pair(mapping: yaml.MappingNode, key: str | int) -> tuple[yaml.ScalarNode, yaml.Node] | None:
    return next((pair for pair in mapping.value if pair[0].value == key), None)


def _text(value: str, mark: yaml.Mark) -> yaml.ScalarNode:
    return yaml.ScalarNode(_STR, value, mark, mark)


def _mark(name: str, line: int = 0, column: int = 0) -> yaml.Mark:
    return yaml.Mark(name, 0, line, column, None, 0)


# -- problems ----------------------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """Where a key stands in the node tree; ``rest`` is the part of it that is not there."""

    path: Key
    mark: yaml.Mark
    node: yaml.Node
    rest: Key


def _report(error: ValidationError, root: yaml.MappingNode) -> list[str]:
    """A line for each problem: those of the file in its order, then those of overrides."""
    problems = [_explain(details, root) for details in error.errors(include_url=False, include_input=False)]
    problems.sort(key=lambda problem: (_is_override(problem[0]), problem[0].line))
    lines = (": ".join(part for part in (_at(mark), _dotted(path), text) if part) for mark, path, text in problems)
    return list(dict.fromkeys(lines))


def _explain(error: ErrorDetails, root: yaml.MappingNode) -> tuple[yaml.Mark, Key, str]:
    """Where a problem lies, at which of the user's keys, and what it is."""
    path, alternatives, elsewhere = _expect(error)
    place = _find(root, path)
    if error["type"] == "value_error":
        return _conflict(error["ctx"]["error"], root, place)
    if error["type"] == "extra_forbidden":
        allowed = [key for alternative in alternatives for key in alternative.get("properties", ())]
        text = f"unknown key; allowed: {', '.join(allowed)}{_guess(path[-1], allowed)}"
        chosen = _find(root, (*path[:-1], "name"))  # an override of the name may have made the key unknown
        is_cause = path[-1] in elsewhere and _is_override(chosen.mark) and not chosen.rest
        return chosen.mark if is_cause else place.mark, path, text
    if place.rest:
        return place.mark, path, f"missing; must be {_describe(alternatives)}"
    return (
        place.mark,
        place.path,
        f"must be {_describe(alternatives)}, not {_show(place.node)}{_hint(alternatives, place.node)}",
    )


def _conflict(error: ValueError, root: yaml.MappingNode, section: _Place) -> tuple[yaml.Mark, Key, str]:
    """Blame the key among those in conflict that an override has set, else the first that is given at all."""
    keys = [(*section.path, *key.split(".")) for key in getattr(error, "keys", ())]
    given = [place for place in (_find(root, key) for key in keys) if not place.rest]
    if not given:
        return section.mark, keys[0] if keys else section.path, str(error)
    blamed = next((place for place in given if _is_override(place.mark)), given[0])
    return blamed.mark, blamed.path, str(error)


def _find(root: yaml.MappingNode, path: Key) -> _Place:
    """The place of ``path``, or of as much of it as is there; ``optimizer: adam`` is the place of ``optimizer.name``."""
    place = _Place((), root.start_mark, root, path)
    while place.rest:
        part, *rest = place.rest
        if isinstance(place.node, yaml.MappingNode) and (pair := _pair(place.node, part)):
            key, value = pair
            place = _Place((*place.path, part), key.start_mark, value, tuple(rest))
        elif isinstance(place.node, yaml.SequenceNode) and isinstance(part, int):
            item = place.node.value[part]
            place = _Place((*place.path, part), item.start_mark, item, tuple(rest))
        elif part == "name" and isinstance(place.node, yaml.ScalarNode) and place.node.tag == _STR:
            place = place._replace(rest=tuple(rest))
        else:
            break
    return place


def _expect(error: ErrorDetails) -> tuple[Key, list[Fragment], set[str]]:
    """The user's key for an error of pydantic's, what is allowed there, and the keys of all variants of its section."""
    location, kind = error["loc"], error["type"]
    if kind == "missing" and isinstance(location[-1], int):  # too short a list
        location = location[:-1]
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        location = (*location, "name")
    path: Key = ()
    alternatives, variants = [_schema()], set()
    for depth, part in enumerate(location, start=1):
        inside = _inside(alternatives, part)
        if inside or (kind == "extra_forbidden" and depth == len(location)):
            path = (*path, part)
            alternatives = inside or alternatives
        else:  # not a key but the tag of the variant that pydantic chose
            variants = {key for alternative in alternatives for key in alternative.get("properties", ())}
            tagged = [a for a in alternatives if a.get("properties", {}).get("name", {}).get("const") == part]
            alternatives = tagged or alternatives
    return path, alternatives, variants


@cache
def _schema() -> Fragment:
    return schema()


def _resolve(fragment: Fragment, definitions: Fragment) -> Fragment:
    return definitions[fragment["$ref"].removeprefix("#/$defs/")] if "$ref" in fragment else fragment


def _inside(alternatives: list[Fragment], part: str | int) -> list[Fragment]:
    """What the schema allows at a key, or a place in a list, of any of ``alternatives``."""
    if isinstance(part, int):
        found = [a.get("items") or a["prefixItems"][part] for a in alternatives if a.get("type") == "array"]
    else:
        found = [a["properties"][part] for a in alternatives if part in a.get("properties", ())]
    return [alternative for fragment in found for alternative in _alternatives(fragment)]


def _alternatives(fragment: Fragment) -> list[Fragment]:
    fragment = _resolve(fragment, _schema()["$defs"])
    options = fragment.get("anyOf") or fragment.get("oneOf")
    return [a for option in options for a in _alternatives(option)] if options else [fragment]


# -- words -------------------------------------------------------------------------------------------------------------


def _describe(alternatives: list[Fragment]) -> str:
    """What the schema allows, in plain words: 'a whole number of at least 1 or {min: ..., max: ...}'."""
    names = _names(alternatives)
    words = [f"one of {', '.join(names)}"] if names else []
    words += [_form(alternative) for alternative in alternatives if not _names([alternative])]
    return " or ".join(dict.fromkeys(words))


def _names(alternatives: list[Fragment]) -> list[str]:
    """The values that the schema enumerates."""
    return [name for a in alternatives for name in a.get("enum", [a["const"]] if "const" in a else [])]


def _form(fragment: Fragment) -> str:
    match fragment["type"]:
        case "integer":
            return f"a whole number{_bounds(fragment)}"
        case "number":
            return f"a number{_bounds(fragment)}"
        case "array":
            item = fragment.get("items") or fragment["prefixItems"][0]
            least = fragment["minItems"]
            count = f"{least}" if fragment.get("maxItems") == least else f"{least} or more"
            return f"a list of {count}, each {_form(item)}"
        case "object" if "required" in fragment:
            return "{" + ", ".join(f"{key}: ..." for key in fragment["required"]) + "}"
        case "object":
            return f"a mapping with keys among {', '.join(fragment['properties'])}"
        case "string":
            return str(fragment.get("patternErrorMessage", "text"))
        case kind:
            return {"boolean": "true or false", "null": "null"}[kind]


def _bounds(fragment: Fragment) -> str:
    bounds = {"above": "exclusiveMinimum", "of at least": "minimum", "below": "exclusiveMaximum", "at most": "maximum"}
    words = {phrase: fragment[keyword] for phrase, keyword in bounds.items() if keyword in fragment}
    if fragment["type"] == "integer" and "above" in words:
        words = {"of at least": words.pop("above") + 1, **words}
    return f" {' and '.join(f'{phrase} {bound}' for phrase, bound in words.items())}" if words else ""


def _show(node: yaml.Node) -> str:
    """A value as the user wrote it."""
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return f"a list of {len(node.value)}"
    text = node.value if len(node.value) <= 60 else f"{node.value[:60]}..."
    if node.tag == _STR:
        return repr(text)
    return {_TAG + "null": "null", _TAG + "bool": f"the boolean {text}"}.get(node.tag, text)


def _hint(alternatives: list[Fragment], node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode) or node.tag == _TAG + "null":
        return ""
    if node.tag == _STR:
        return _guess(node.value, _names(alternatives))
    wants_text = any(a.get("type") == "string" and not _names([a]) for a in alternatives)
    return f"; quote it: {node.value!r}" if wants_text else ""


def _guess(word: str | int, names: list[str]) -> str:
    close = difflib.get_close_matches(str(word).lower(), names, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _dotted(path: Key) -> str:
    """``('model', 'hidden', 0)`` as ``model.hidden[0]``."""
    plain = re.compile(r"[\w-]+")
    words = (f"[{p}]" if isinstance(p, int) else f".{p if plain.fullmatch(p) else repr(p)}" for p in path)
    return "".join(words).removeprefix(".")


def _at(mark: yaml.Mark, column: bool = False) -> str:
    if _is_override(mark):
        return mark.name
    return f"{mark.name}:{mark.line + 1}" + (f":{mark.column + 1}" if column else "")


def _is_override(mark: yaml.Mark) -> bool:
    return mark.name.startswith(_OVERRIDE)


def _invalid(*problems: str) -> ConfigError:
    """The error for ``problems``, each on one line whatever its values hold."""
    lines = ("".join(c if c.isprintable() else repr(c)[1:-1] for c in problem) for problem in problems)
    return ConfigError("\n".join(lines))
