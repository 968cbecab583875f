"""JSON that every reader takes: numbers that are not finite, which JSON does not have, are texts."""

import json
import math
from typing import Any

NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""The texts that stand for them, as in the JSON of Protocol Buffers."""


def to_json(content: Any, **options: Any) -> str:
    """The content as JSON, in one line unless ``options``, which are of ``json.dumps``, say otherwise.

    Example:
        >>> to_json({"loss": 0.5, "f1": float("nan")})
        '{"loss": 0.5, "f1": "NaN"}'
    """
    try:
        return json.dumps(content, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_with_texts(content), allow_nan=False, **options)


def number(value: Any) -> Any:
    """What stands where a number is expected: one that is not finite for its text, all else as it is."""
    return NOT_FINITE.get(value, value) if isinstance(value, str) else value


def text_of(value: float) -> str | None:
    """The text of a number that is not finite; None of one that is."""
    return None if math.isfinite(value) else "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _with_texts(content: Any) -> Any:
    if isinstance(content, float):
        return text_of(content) or content
    if isinstance(content, dict):
        return {key: _with_texts(value) for key, value in content.items()}
    return [_with_texts(value) for value in content] if isinstance(content, list | tuple) else content
