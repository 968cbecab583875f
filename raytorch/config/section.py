"""Base of every section of a configuration."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, lt=1)]


class ConflictError(ValueError):
    """Values that are valid one by one but not together; ``keys`` name them, from where the error is raised."""

    def __init__(self, message: str, *keys: str) -> None:
        super().__init__(message)
        self.keys = keys


def name_alone(value: Any) -> Any:
    """Let ``optimizer: adam`` stand for ``optimizer: {name: adam}``."""
    return {"name": value} if isinstance(value, str) else value


class Section(BaseModel):
    """A part of a run's configuration; unknown keys are refused and values are not changed after validation."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
