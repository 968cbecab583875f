"""Write docs/configuration.md from the schema: python docs/configuration.py"""

import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from raytorch.config import Asha, Metric, ModelKeys, OwnPart, Parameter, ParameterGroup, RunConfig, SweepConfig
from raytorch.config.resuming import RULES, OnResume

TARGET = Path(__file__).with_suffix(".md")
SWEEPS = """
# Sweeps

Every key of a sweep's file, `raytorch sweep FILE`. `run` is a run as above, or the name of its file.
"""
RESUMING = """
# Resuming

What `raytorch train [FILE] --resume RUN [--set K=V]` does with keys that differ from those that the run was trained
with. What is refused is named before anything is written, and the run can be resumed as before. The nearest key counts.

| key | on resume | |
|---|---|---|
"""
HEADER = """# Configuration

Every key of a run's file, its default, and what it means. This page is written by `python docs/configuration.py`.
A section with variants takes the variant's name, and its name alone stands for all defaults: `optimizer: adamw`.
"""


def page() -> str:
    """The whole page."""
    lines = [
        HEADER.rstrip(),
        *_table("Run", RunConfig, ""),
        *_table("Every `model`", ModelKeys, "model."),
        *_sections(),
        *_table("Each of `metrics`", Metric, ""),
        *_table("Each of `optimizer.groups`", ParameterGroup, ""),
        RESUMING.rstrip(),
        *_rules(),
        SWEEPS.rstrip(),
    ]
    lines += [*_table("Sweep", SweepConfig, ""), *_table("`parameters`", Parameter, "parameters.KEY.")]
    lines += _table("`asha`", Asha, "asha.")
    return "\n".join(lines).replace("``", "`") + "\n"


def _sections() -> Iterator[str]:
    for key, field in RunConfig.model_fields.items():
        for model in _models(field.annotation):
            name = model.model_fields.get("name")
            title = f"`{key}: {name.default}`" if name and get_origin(name.annotation) is Literal else f"`{key}`"
            if title == "`loss: cross_entropy`":
                title = "`loss`"
            if issubclass(model, OwnPart):
                title = f"`{key}: FILE.py:NAME`"
            yield from _table(title, model, f"{key}.")


def _rules() -> Iterator[str]:
    for key, rule in RULES.items():
        what = f"**{rule.what}**" if rule.what is OnResume.REFUSED else rule.what
        yield f"| `{key}` | {what} | {rule.remark} |"


def _table(title: str, model: type[BaseModel], prefix: str) -> Iterator[str]:
    yield f"\n## {title}\n"
    yield f"{' '.join((model.__doc__ or '').split())}\n"
    rows = list(_rows(model, prefix))
    if rows:
        yield "| key | default | |\n|---|---|---|"
        yield from rows


def _rows(model: type[BaseModel], prefix: str) -> Iterator[str]:
    shared = () if model is ModelKeys or not issubclass(model, ModelKeys) else ModelKeys.model_fields
    for key, field in model.model_fields.items():
        nested = _models(field.annotation)
        if key in shared:
            continue
        if prefix and nested and not isinstance(field.default, int):
            yield from _rows(nested[0], f"{prefix}{key}.")
        elif not (prefix and key == "name" and len(get_args(field.annotation)) == 1):
            yield f"| `{prefix}{key}` | {_default(field, nested)} | {_description(field)} |"


def _description(field: FieldInfo) -> str:
    choices = (
        [f"`{choice}`" for choice in get_args(field.annotation)] if get_origin(field.annotation) is Literal else []
    )
    text = " ".join((field.description or "").split())
    return f"{text} One of {', '.join(choices)}." if choices else text


def _default(field: FieldInfo, nested: list[type[BaseModel]]) -> str:
    value = field.default
    if value is PydanticUndefined:
        return "required"
    if nested and isinstance(value, BaseModel):
        return f"`{value.name}`" if hasattr(value, "name") else "below"
    return "" if value is None else f"`{json.dumps(value) if isinstance(value, bool | tuple) else value}`"


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The sections that an annotation admits."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType):
        return [model for part in get_args(annotation) for model in _models(part)]
    return _models(get_args(annotation)[0]) if get_origin(annotation) is Annotated else []


if __name__ == "__main__":
    TARGET.write_text(page())
