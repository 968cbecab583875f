"""The JSON schema of a configuration's file: for editors, and to say what is allowed where it is wrong."""

from functools import cache
from typing import Any

from raytorch.config.run import RunConfig
from raytorch.config.section import Section

Fragment = dict[str, Any]
"""A part of a JSON schema."""


def schema(kind: type[Section] = RunConfig) -> Fragment:
    """The JSON schema (draft 2020-12) of a run's file, by which editors complete and check it."""
    run = kind.model_json_schema()
    definitions = run.setdefault("$defs", {})
    for section in definitions.values():
        # The name tells the variants of a section apart: Python code may leave it out, a file may not.
        if "const" in section["properties"].get("name", {}):
            section["required"] = ["name"]
    whole = run if issubclass(kind, RunConfig) else definitions.get("RunConfig", {"properties": {}})
    for section in whole["properties"].values():
        if isinstance(section.get("default"), dict) and "name" in section["default"]:
            # As RunConfig does, accept ``optimizer: adam`` for ``optimizer: {name: adam}``.
            variants = _alternatives({key: section.pop(key) for key in ("oneOf", "$ref") if key in section})
            section.pop("discriminator", None)
            names = [_resolve(variant, definitions)["properties"]["name"] for variant in variants]
            own = [name for name in names if not enumerated([name])]
            section["anyOf"] = [{"enum": enumerated(names)}, *own, *variants]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **run, "title": "raytorch run"}


@cache
def whole_schema(kind: type[Section]) -> Fragment:
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


def allowed_at(alternatives: list[Fragment], part: str | int) -> list[Fragment]:
    """Return what the schema allows at a key, or a place in a list, of any of ``alternatives``."""
    if isinstance(part, int):
        found = [item_of(a) for a in alternatives if a.get("type") == "array"]
    else:
        found = [a["properties"][part] for a in alternatives if part in a.get("properties", ())]
        found += [a["additionalProperties"] for a in alternatives if isinstance(a.get("additionalProperties"), dict)]
    return [alternative for fragment in found for alternative in _alternatives(fragment)]


def _alternatives(fragment: Fragment) -> list[Fragment]:
    options = fragment.get("anyOf") or fragment.get("oneOf")
    return [a for option in options for a in _alternatives(option)] if options else [fragment]


def _resolve(fragment: Fragment, definitions: Fragment) -> Fragment:
    return definitions[fragment["$ref"].removeprefix("#/$defs/")] if "$ref" in fragment else fragment


def item_of(array: Fragment) -> Fragment:
    """Return what the schema allows in a list."""
    item: Fragment = array["items"] if "items" in array else array["prefixItems"][0]
    return item


def enumerated(alternatives: list[Fragment]) -> list[str]:
    """The values that the schema enumerates."""
    return [str(name) for a in alternatives for name in a.get("enum", [a["const"]] if "const" in a else [])]
