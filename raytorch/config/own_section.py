"""Sections for a user's own classes and functions: the keys are their parameters, as the source code has them."""

from collections.abc import Collection, Iterator
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, create_model, model_validator
from pydantic.fields import FieldInfo

from raytorch.config.section import ConflictError, Section
from raytorch.config.signature import REQUIRED, UNKNOWN, Default, Parameter, Signature, is_json
from raytorch.system.python_files import ProjectError

PREFIX = "parameter_"
"""Beginning of the names of fields that cannot have their parameter's own."""


class OwnArguments(Section):
    """Base of sections with arguments for code of a user's own, which records keep as JSON."""

    @model_validator(mode="before")
    @classmethod
    def _json_has_them(cls, section: Any) -> Any:
        for key, value in section.items() if isinstance(section, dict) else ():
            if not _is_finite(value):
                raise ConflictError("must be of texts, finite numbers, lists and mappings, none of them in itself", key)
        return section


class OwnSection(OwnArguments):
    """Base of the sections that :func:`section_of` makes."""

    model_config = ConfigDict(protected_namespaces=(), use_attribute_docstrings=False)

    name: Annotated[str, Field(description="The class or function, FILE.py:NAME.")]


def section_of(
    signature: Signature,
    name: str,
    skip: int | Collection[str] = 0,
    optional: Collection[str] = (),
    base: type[OwnSection] = OwnSection,
) -> type[OwnSection]:
    """The section whose keys are the parameters of what is called ``name``, but for those that are given otherwise.

    Args:
        signature: What it takes.
        name: The only value of the section's ``name``, by default there.
        skip: How many parameters are given by position, or the names of those that are no keys.
        optional: Parameters that have to be given, but not in the section.
        base: The section's class, whose attributes are no keys.

    Raises ProjectError for a parameter that no key can stand for.

    Example:
        >>> signature = signature_of("def net(classes, width: int = 8): ...", "net")
        >>> arguments_of(section_of(signature, "nets.py:net", skip=1)(width=16))
        {'width': 16}
    """
    fields: dict[str, Any] = {"name": (Literal[name], name)}
    for parameter in _keys(signature, skip):
        _require_key(parameter, base)
        fields[_field_name(parameter.name, base)] = _field(parameter, is_optional=parameter.name in optional)
    return create_model(name, __base__=base, __module__=__name__, **fields)


def arguments_of(section: OwnSection) -> dict[str, Any]:
    """The values of a section by the names of the parameters, without those that are left to the code."""
    kind, base = type(section), type(section).__base__
    fields = {key: field for key, field in kind.model_fields.items() if key not in getattr(base, "model_fields", {})}
    values = {field.alias or key: getattr(section, key) for key, field in fields.items()}
    return {name: value for name, value in values.items() if value is not UNKNOWN}


def _is_finite(value: Any) -> bool:
    try:
        return is_json(value)
    except RecursionError:  # an alias stands inside what it repeats
        return False


def _keys(signature: Signature, skip: int | Collection[str]) -> Iterator[Parameter]:
    skipped = signature.by_position[:skip] if isinstance(skip, int) else skip
    for parameter in signature.parameters:
        by_position_alone = parameter.kind == "positional_only" and parameter.default is not REQUIRED
        if parameter.name not in skipped and not by_position_alone:
            yield parameter


def _require_key(parameter: Parameter, base: type[OwnSection]) -> None:
    if parameter.name in base.model_fields:
        raise ProjectError(
            f"has a parameter {parameter.name!r} (line {parameter.line}), which is a key of raytorch's own; rename it"
        )
    if parameter.kind == "positional_only":
        raise ProjectError(
            f"takes {parameter.name} by position alone (line {parameter.line}), which no key can give; let it be given "
            "by its name"
        )


def _field_name(name: str, base: type[OwnSection]) -> str:
    """A name that pydantic admits: the parameter's own, unless it begins with ``_`` or every section has it."""
    is_free = not name.startswith(("_", PREFIX)) and not hasattr(base, name)
    return name if is_free else f"{PREFIX}{name}"


def _field(parameter: Parameter, *, is_optional: bool) -> tuple[Any, FieldInfo]:
    kind, default = Any if parameter.annotation is None else parameter.annotation, parameter.default
    if default is None and kind is not Any:
        kind = kind | None
    if not isinstance(default, Default):
        kind, default = _fitting(kind, default)
    return kind, _field_info(parameter.name, UNKNOWN if default is REQUIRED and is_optional else default)


def _field_info(name: str, default: Any) -> FieldInfo:
    info: FieldInfo
    if default is REQUIRED:
        info = Field(alias=name)
    elif default is UNKNOWN:  # by a factory, so that the JSON schema has none
        info = Field(alias=name, default_factory=lambda: UNKNOWN)
    else:
        info = Field(alias=name, default=default)
    return info


def _fitting(kind: Any, default: Any) -> tuple[Any, Any]:
    """A type and default that read the same when they are written down: where it can be ``kind``, else any value."""
    written = _as_lists(default)
    if kind is not Any:
        with suppress(ValidationError):
            value = TypeAdapter(kind, config=ConfigDict(strict=True)).validate_python(written)
            return kind, value
    return Any, default if written == default else UNKNOWN


def _as_lists(value: Any) -> Any:
    """The value as YAML gives it back, which has lists for tuples."""
    if isinstance(value, list | tuple):
        return [_as_lists(each) for each in value]
    if isinstance(value, dict):
        return {key: _as_lists(each) for key, each in value.items()}
    return value
