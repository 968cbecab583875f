"""A run's YAML file: read, override, check and write it; each problem is one line that says where and what is allowed.

The file becomes a tree of nodes that know where they stand. Overrides are grafted into it, and so one tree tells where
a value that pydantic refuses came from. What is allowed instead is read off the JSON schema.
"""

import difflib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from raytorch import yaml_tree as tree
from raytorch.config import RunConfig, Section
from raytorch.yaml_tree import Key, Problem

Fragment = dict[str, Any]
"""A part of a JSON schema."""

Config = TypeVar("Config", bound=Section)


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the run that a YAML file describes.

    An override is written ``KEY=VALUE``: a dotted key, and a value in YAML. It wins over the file and over overrides
    before it, and leaves the rest of its section as it is.

    Raises:
        ConfigError: the file or an override is invalid. Its message has one line for each problem, which starts with
            ``FILE:LINE: KEY:``, or with ``--set KEY=VALUE: KEY:`` where an override is to blame.
    """
    root = read(path, RunConfig, "give at least epochs or steps")
    for override in overrides:
        apply_override(root, override, RunConfig)
    return check(root, RunConfig)


def dump(config: Section) -> str:
    """Write a run in full, defaults included, as YAML that :func:`load` reads back to an equal run."""
    return tree.dump(config.model_dump(mode="json"))


def read(path: str | Path, kind: type[Section], least: str) -> yaml.MappingNode:
    """The tree of a file; ``least`` says what an empty one lacks.

    Raises:
        ConfigError: The file cannot be read, is not YAML, or holds something else than a mapping.
    """
    return compose(_read(path), str(path), kind, least)


def compose(raw: bytes, name: str, kind: type[Section], least: str) -> yaml.MappingNode:
    """As :func:`read`, of the content of the file ``name``."""
    root = tree.compose(_decoded(raw, name), name)
    if root is None:
        raise tree.invalid(f"{name}: the file is empty; {least}")
    if not isinstance(root, yaml.MappingNode):
        raise tree.report([Problem(root.start_mark, (), _must_be([_schema(kind)], root))])
    return root


def parse(raw: bytes, name: str, kind: type[Config], least: str = "it is damaged") -> Config:
    """The configuration in the content of the file ``name``.

    Raises:
        ConfigError: As :func:`load` does.
    """
    return check(compose(raw, name, kind, least), kind)


def check(root: yaml.MappingNode, kind: type[Config]) -> Config:
    """The configuration that a tree stands for.

    Raises:
        ConfigError: The tree does not fit ``kind``.
    """
    try:
        return kind.model_validate(tree.construct(root))
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
        told, untold = details[: tree.MOST_PROBLEMS], details[tree.MOST_PROBLEMS :]
        raise tree.report([_explain(each, root, _schema(kind)) for each in told], len(untold)) from None


def schema(kind: type[Section] = RunConfig) -> Fragment:
    """The JSON schema (draft 2020-12) of a run's file, by which editors complete and check it."""
    run = kind.model_json_schema()
    definitions = run["$defs"]
    for section in definitions.values():
        # The name tells the variants of a section apart: Python code may leave it out, a file may not.
        if "const" in section["properties"].get("name", {}):
            section["required"] = ["name"]
    for section in (run if kind is RunConfig else definitions["RunConfig"])["properties"].values():
        if isinstance(section["default"], dict) and "name" in section["default"]:
            # As RunConfig does, accept ``optimizer: adam`` for ``optimizer: {name: adam}``.
            variants = section.pop("oneOf", None) or [{"$ref": section.pop("$ref")}]
            section.pop("discriminator", None)
            names = _names([_resolve(variant, definitions)["properties"]["name"] for variant in variants])
            section["anyOf"] = [{"enum": names}, *variants]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **run, "title": "raytorch run"}


def _read(path: str | Path) -> bytes:
    try:
        with Path(path).open("rb") as file:
            return file.read(tree.LARGEST + 1)  # of a device without end, say
    except FileNotFoundError:
        raise tree.invalid(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: the path holds a null character
        raise tree.invalid(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _decoded(raw: bytes, name: str) -> str:
    tree.check_size(len(raw), name)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise tree.invalid(f"{name}:{line}: not UTF-8; save the file as UTF-8") from None


# -- overrides ---------------------------------------------------------------------------------------------------------


def apply_override(root: yaml.MappingNode, override: str, kind: type[Section]) -> None:
    """Graft the value of ``optimizer.lr=0.01`` into the tree of a configuration.

    Raises:
        ConfigError: The override is not ``KEY=VALUE``, or the value not YAML.
    """
    name = tree.OVERRIDE + override
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(key and key.isprintable() for key in keys):
        raise tree.invalid(f"{name}: must be KEY=VALUE, such as optimizer.lr=0.01")
    mark = tree.mark_at(name)
    graft(root, keys, tree.compose(text, name, tuple(keys)) or tree.scalar("", mark, tree.NULL), mark, kind)


def graft(root: yaml.MappingNode, keys: list[str], value: yaml.Node, mark: yaml.Mark, kind: type[Section]) -> None:
    """Put ``value`` where ``keys`` lead, in new mappings at ``mark``: what shares the old ones stays as it is."""
    mapping = root
    fields: Mapping[str, Any] = kind.model_fields
    for key in keys[:-1]:
        field = fields.get(key)
        mapping = _open(mapping, tree.scalar(key, mark), default=getattr(field and field.default, "name", None))
        fields = getattr(field and field.annotation, "model_fields", {})
    tree.put(mapping, tree.scalar(keys[-1], mark), value)


def _open(parent: yaml.MappingNode, key: yaml.ScalarNode, default: str | None) -> yaml.MappingNode:
    """Make the value of ``key`` a mapping to write into: a copy, since aliases may share what is there.

    A name that stands alone goes under ``name``, and so does ``default`` where nothing stands.
    """
    old_key, value = tree.pair(parent, key.value) or (key, None)
    if isinstance(value, yaml.MappingNode):
        key, pairs = old_key, list(value.value)
    elif isinstance(value, yaml.ScalarNode) and value.tag == tree.STR:
        key, pairs = old_key, [(tree.scalar("name", value.start_mark), value)]
    else:
        pairs = [(tree.scalar("name", key.start_mark), tree.scalar(default, key.start_mark))] if default else []
    mapping = yaml.MappingNode(tree.MAP, pairs, key.start_mark, key.end_mark)
    tree.put(parent, key, mapping)
    return mapping


# -- problems ----------------------------------------------------------------------------------------------------------


def _explain(error: ErrorDetails, root: yaml.MappingNode, allowed_there: Fragment) -> Problem:
    """Say in the user's terms what pydantic refuses."""
    path, alternatives, siblings = _expect(error, allowed_there)
    place = tree.find(root, path)
    if error["type"] == "value_error":
        return _conflict(error["ctx"]["error"], root, place)
    if error["type"] == "extra_forbidden":
        allowed = [key for alternative in alternatives for key in alternative.get("properties", ())]
        text = f"unknown key; allowed: {', '.join(allowed)}{_guess(path[-1], allowed)}"
        variant = tree.find(root, (*path[:-1], "name"))
        changed = path[-1] in siblings and not variant.rest and tree.is_override(variant.mark)
        return Problem(variant.mark if changed else place.mark, path, text)
    if place.rest:
        return Problem(place.mark, path, f"missing; must be {_describe(alternatives)}")
    return Problem(place.mark, place.path, _must_be(alternatives, place.node))


def _conflict(error: ValueError, root: yaml.MappingNode, section: tree.Place) -> Problem:
    """Blame the key in conflict that an override has set, else the first that is given at all."""
    keys = [(*section.path, *key.split(".")) for key in getattr(error, "keys", ())]
    given = [place for place in (tree.find(root, key) for key in keys) if not place.rest]
    if not given:
        return Problem(section.mark, keys[0] if keys else section.path, str(error))
    blamed = next((place for place in given if tree.is_override(place.mark)), given[0])
    return Problem(blamed.mark, blamed.path, str(error))


def _expect(error: ErrorDetails, whole: Fragment) -> tuple[Key, list[Fragment], set[str]]:
    """The user's key for an error of pydantic's, what is allowed there, and the keys of all variants of its section."""
    location, kind = error["loc"], error["type"]
    if kind == "missing" and isinstance(location[-1], int):  # the list is too short
        location = location[:-1]
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        location = (*location, "name")
    path: Key = ()
    alternatives: list[Fragment] = [whole]
    siblings: set[str] = set()
    for depth, part in enumerate(location, start=1):
        inside = _inside(alternatives, part)
        if inside or (kind == "extra_forbidden" and depth == len(location)):
            path = (*path, part)
            alternatives = inside or alternatives
        else:  # no key, but the tag of the variant that pydantic chose
            siblings = {key for alternative in alternatives for key in alternative.get("properties", ())}
            alternatives = [a for a in alternatives if part in _names(_inside([a], "name"))] or alternatives
    return path, alternatives, siblings


@cache
def _schema(kind: type[Section]) -> Fragment:
    """The schema with every definition in its place."""
    whole = schema(kind)
    definitions = whole.pop("$defs")

    def expand(fragment: Any) -> Any:
        if isinstance(fragment, list):
            return [expand(part) for part in fragment]
        if isinstance(fragment, dict):
            return {key: expand(part) for key, part in _resolve(fragment, definitions).items()}
        return fragment

    return dict(expand(whole))


def _inside(alternatives: list[Fragment], part: str | int) -> list[Fragment]:
    """What the schema allows at a key, or a place in a list, of any of ``alternatives``."""
    if isinstance(part, int):
        found = [_item(a) for a in alternatives if a.get("type") == "array"]
    else:
        found = [a["properties"][part] for a in alternatives if part in a.get("properties", ())]
        found += [a["additionalProperties"] for a in alternatives if a.get("additionalProperties")]
    return [alternative for fragment in found for alternative in _alternatives(fragment)]


def _alternatives(fragment: Fragment) -> list[Fragment]:
    options = fragment.get("anyOf") or fragment.get("oneOf")
    return [a for option in options for a in _alternatives(option)] if options else [fragment]


def _resolve(fragment: Fragment, definitions: Fragment) -> Fragment:
    return definitions[fragment["$ref"].removeprefix("#/$defs/")] if "$ref" in fragment else fragment


def _item(array: Fragment) -> Fragment:
    item: Fragment = array["items"] if "items" in array else array["prefixItems"][0]
    return item


# -- words -------------------------------------------------------------------------------------------------------------


def _must_be(alternatives: list[Fragment], node: yaml.Node) -> str:
    text = f"must be {_describe(alternatives)}, not {tree.show(node)}"
    if node.tag == tree.STR:
        return text + _guess(node.value, _names(alternatives))
    unquoted = isinstance(node, yaml.ScalarNode) and node.tag != tree.NULL
    wants_text = any(a.get("type") == "string" and not _names([a]) for a in alternatives)
    return f"{text}; quote it: {node.value!r}" if unquoted and wants_text else text


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
        case "boolean":
            return "true or false"
        case "string":
            return str(fragment.get("patternErrorMessage", "text"))
        case "array":
            least = fragment.get("minItems")
            count = (
                "" if least is None else f" of {least}" if fragment.get("maxItems") == least else f" of {least} or more"
            )
            each = f", each {_describe([_item(fragment)])}" if _item(fragment) else ""
            return f"a list{count}{each}"
        case "object":
            return _mapping_form(fragment)
        case kind:  # null
            return str(kind)


def _mapping_form(fragment: Fragment) -> str:
    if "required" in fragment:
        return f"{{{', '.join(f'{key}: ...' for key in fragment['required'])}}}"
    if "properties" in fragment:
        return f"a mapping with keys among {', '.join(fragment['properties'])}"
    return f"a mapping of {fragment['minProperties']} or more keys"


def _bounds(number: Fragment) -> str:
    keywords = {
        "of at least": "minimum",
        "above": "exclusiveMinimum",
        "at most": "maximum",
        "below": "exclusiveMaximum",
    }
    bounds = {words: number[keyword] for words, keyword in keywords.items() if keyword in number}
    if number["type"] == "integer" and "above" in bounds:
        bounds = {"of at least": bounds.pop("above") + 1, **bounds}
    return " and".join(f" {words} {bound}" for words, bound in bounds.items())


def _guess(word: str | int, names: list[str]) -> str:
    close = difflib.get_close_matches(str(word).lower(), names, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
