"""Base of every section of a configuration."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raytorch.errors import ConfigError

Fraction = Annotated[float, Field(ge=0, lt=1)]


class ConflictError(ValueError):
    """Values that are valid one by one but not together; ``keys`` name them, from where the error is raised."""

    def __init__(self, message: str, *keys: str) -> None:
        super().__init__(message)
        self.keys = keys


def name_alone(value: Any) -> Any:
    """Let ``optimizer: adam`` stand for ``optimizer: {name: adam}``."""
    return {"name": value} if isinstance(value, str) else value


Refusal = Callable[[type["Section"], Mapping[str, Any], ValidationError], ConfigError]
_refusals: list[Refusal] = []


def tell_mistakes_by(refusal: Refusal) -> None:
    """Have mistakes in sections that are made in Python told by ``refusal``, as those of a file are."""
    _refusals[:] = [refusal]


class Section(BaseModel):
    """A part of a run's configuration; unknown keys are refused and values are not changed after validation."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    def __init__(self, /, **data: Any) -> None:
        """Check the values. Raises ConfigError, whose message has a line for each problem."""
        try:
            super().__init__(**data)
        except ValidationError as error:
            for refusal in _refusals:
                raise refusal(type(self), data, error) from None
            raise

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined] # else it would be called by pydantic as well

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            super().__setattr__(name, value)
        except ValidationError:
            raise ConfigError(
                f"{name}: a configuration stays as it is; make another: raytorch.load(config, {{{name!r}: ...}})"
            ) from None
