"""What is done to a model before it is trained, whichever it is: keys of every model's section."""

from typing import Annotated, Self

from pydantic import Field

from raytorch.config.section import Section

NamePattern = Annotated[str, Field(min_length=1, json_schema_extra={"patternErrorMessage": "a pattern of names"})]


class ModelKeys(Section):
    """Keys that every model has, shipped or of your own, beside those of what it is built from."""

    weights: Annotated[str, Field(min_length=1)] | None = None
    """What it begins with: a file (``.safetensors``, ``.pt``, ``.pth``, ``.bin`` or ``.ckpt``) from the current folder,
    or a run, by its name or folder, of which the latest checkpoint is taken. Read by a run that has no checkpoint yet;
    null leaves the model as it is built."""
    strict: bool = True
    """Whether ``weights`` has to have all that the model has, of the same shapes, and nothing else; ``false`` takes
    what fits, and the run's record says what does not."""
    freeze: list[NamePattern] = []
    """Patterns of names of parameters that stay as they are: ``["stem.*"]``. A part of which all parameters do computes
    as in evaluation: its running statistics stay, too, and it drops nothing out."""
    checkpointing: list[NamePattern] = []
    """Patterns of names of modules that are computed again in the backward pass, in place of keeping what is in them:
    ``["blocks.*"]``. The numbers are the same, with less memory and more time."""

    def as_built(self) -> Self:
        """The same model without them, as it is kept beside its weights."""
        return self.model_copy(update={key: field.get_default() for key, field in ModelKeys.model_fields.items()})
