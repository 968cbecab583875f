"""Messages of mistakes in a file: one line that says where and what is allowed, and the nearest name."""

import re

import yaml
from pydantic_core import ErrorDetails

from raytorch.config import yaml_tree as tree
from raytorch.config.json_schema import Fragment, allowed_at, enumerated, item_of
from raytorch.system.near_names import did_you_mean

ANY_VALUE = "any value"


def explain(error: ErrorDetails, root: yaml.MappingNode, allowed_there: Fragment) -> tree.Problem:
    """Say in the user's terms what pydantic refuses."""
    path, alternatives, siblings = _expect(error, allowed_there)
    location = tree.find(root, path)
    if error["type"] == "value_error":
        return _conflict(error["ctx"]["error"], root, location)
    if error["type"] == "extra_forbidden":
        allowed = list(dict.fromkeys(key for each in alternatives for key in each.get("properties", ())))
        text = f"unknown key; allowed: {', '.join(allowed)}{did_you_mean(path[-1], allowed)}"
        variant = tree.find(root, (*path[:-1], "name"))
        changed = path[-1] in siblings and not variant.rest and tree.is_override(variant.mark)
        return tree.Problem(variant.mark if changed else location.mark, path, text)
    if location.rest:
        wanted = _describe(alternatives)
        text = "missing, and has no default" if wanted == ANY_VALUE else f"missing; must be {wanted}"
        return tree.Problem(location.mark, path, text)
    return tree.Problem(location.mark, location.path, must_be(alternatives, location.node))


def _conflict(error: ValueError, root: yaml.MappingNode, section: tree.Location) -> tree.Problem:
    """Blame the key in conflict that an override has set, else the first that is given at all."""
    keys = [(*section.path, *key.split(".")) for key in getattr(error, "keys", ())]
    given = [location for location in (tree.find(root, key) for key in keys) if not location.rest]
    if not given:
        return tree.Problem(section.mark, keys[0] if keys else section.path, str(error))
    blamed = next((location for location in given if tree.is_override(location.mark)), given[0])
    return tree.Problem(blamed.mark, blamed.path, str(error))


def _expect(error: ErrorDetails, whole: Fragment) -> tuple[tree.Key, list[Fragment], set[str]]:
    """The user's key for an error of pydantic's, what is allowed there, and the keys of all variants of its section."""
    location, kind = error["loc"], error["type"]
    if kind == "missing" and isinstance(location[-1], int):  # the list is too short
        location = location[:-1]
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        location = (*location, "name")
    path: tree.Key = ()
    alternatives: list[Fragment] = [whole]
    siblings: set[str] = set()
    for depth, part in enumerate(location, start=1):
        inside = allowed_at(alternatives, part)
        if inside or (kind == "extra_forbidden" and depth == len(location)):
            path = (*path, part)
            alternatives = inside or alternatives
        else:  # no key, but the tag of the variant that pydantic chose
            siblings = {key for alternative in alternatives for key in alternative.get("properties", ())}
            alternatives = [a for a in alternatives if part in enumerated(allowed_at([a], "name"))] or alternatives
    return path, alternatives, siblings


def must_be(alternatives: list[Fragment], node: yaml.Node) -> str:
    """Say what a value has to be, what it is, and what may have been meant."""
    text = f"must be {_describe(alternatives)}, not {tree.show(node)}"
    if node.tag == tree.STR:
        return text + did_you_mean(node.value, enumerated(alternatives))
    may_be_number = any(a.get("type") in ("number", "integer") for a in alternatives)
    is_number = node.tag.endswith((":int", ":float")) and may_be_number  # and out of its bounds
    unquoted = isinstance(node, yaml.ScalarNode) and node.tag != tree.NULL and not is_number
    texts = [a for a in alternatives if unquoted and a.get("type") == "string" and not enumerated([a])]
    wants_text = any(re.search(a.get("pattern", ""), node.value) for a in texts)
    return f"{text}; quote it: {node.value!r}" if wants_text else text


def _describe(alternatives: list[Fragment]) -> str:
    """Say in plain words what the schema allows: 'a whole number of at least 1 or {min: ..., max: ...}'."""
    names = list(dict.fromkeys(enumerated(alternatives)))
    words = [f"one of {', '.join(names)}"] if names else []
    words += [_form(alternative) for alternative in alternatives if not enumerated([alternative])]
    return " or ".join(dict.fromkeys(words))


def _form(fragment: Fragment) -> str:
    match fragment.get("type"):
        case None:
            return ANY_VALUE
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
            each = f", each {_describe(allowed_at([fragment], 0))}" if item_of(fragment) else ""
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
    return f"a mapping of {fragment['minProperties']} or more keys" if "minProperties" in fragment else "a mapping"


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
