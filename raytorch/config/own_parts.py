"""Parts of a run that its user has written: ``FILE.py:NAME`` stands where a shipped part has its name.

A configuration that holds them is checked against their signatures as its file is read; see
:mod:`raytorch.config.own_code`.
"""

from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, model_validator

from raytorch.config.model_keys import ModelKeys
from raytorch.config.own_section import OwnArguments, OwnSection
from raytorch.config.project import is_reference
from raytorch.config.reading_keys import ReadingKeys
from raytorch.config.section import ConflictError

REFERENCE_FORM = "FILE.py:NAME of your own"


class OwnPart(OwnArguments):
    """A class or function in a file of the user's project, and the arguments to call it with."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"additionalProperties": True})

    called_with: ClassVar[tuple[str, ...]] = ()
    """What it is given by position, in front of its own arguments."""

    name: Annotated[
        str, Field(pattern=r"^[^:]+\.py:[^:.]+$", json_schema_extra={"patternErrorMessage": REFERENCE_FORM})
    ]
    """The file, relative to the configuration's folder or the project's, and a name at its top level."""

    @property
    def arguments(self) -> dict[str, Any]:
        """What it is to be called with: all keys that are not raytorch's."""
        return self.model_dump(exclude=set(type(self).model_fields))


class OwnData(ReadingKeys, OwnPart):
    """A data set: a class whose instances, one for the split ``train`` and one for ``test``, have a length and samples.

    It is called with the split and its own keys. ``root`` among them is a folder, as of the shipped data sets.
    """

    model_config = OwnPart.model_config

    called_with: ClassVar[tuple[str, ...]] = ("the split",)
    kind: ClassVar[None] = None
    """Any kind of input."""
    input_shape: ClassVar[None] = None
    """Known when it is read."""


class OwnDataSection(ReadingKeys, OwnSection):
    """Base of the sections of own data sets whose signature is known."""

    model_config = OwnSection.model_config

    kind: ClassVar[None] = None
    input_shape: ClassVar[None] = None


class OwnModel(ModelKeys, OwnPart):
    """A model: a class or function that returns a ``torch.nn.Module``.

    Of the data's facts, such as ``input_shape`` and ``num_classes``, it gets those that it has parameters for.
    """

    model_config = OwnPart.model_config

    reads: ClassVar[tuple[str, ...] | None] = None
    """Any kind of input."""
    losses: ClassVar[tuple[str, ...] | None] = None
    """Any."""
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)
    """As those of the shipped models, unless the run names others."""

    def check_input(self, shape: tuple[int, ...]) -> None:
        """Whether it can read inputs of ``shape`` is for its own code to say."""


class OwnModelSection(ModelKeys, OwnSection):
    """Base of the sections of own models whose signature is known."""

    model_config = OwnSection.model_config

    reads: ClassVar[None] = None
    losses: ClassVar[None] = None
    metrics: ClassVar[tuple[str, ...]] = OwnModel.metrics

    def check_input(self, shape: tuple[int, ...]) -> None:
        """As of :class:`OwnModel`."""


class _ToldSection(OwnSection):
    """Base of the sections of own code that is told more than its section says."""

    facts: ClassVar[tuple[str, ...]]
    """Parameters that are given otherwise."""
    giver: ClassVar[str] = "the data"

    @model_validator(mode="before")
    @classmethod
    def _facts_are_given(cls, section: Any) -> Any:
        for fact in cls.facts:
            if isinstance(section, dict) and fact in section:
                raise ConflictError(f"is given by {cls.giver}; leave it out", fact)
        return section


class ShownModelSection(_ToldSection, OwnModelSection):
    """The same, on a data set that ships."""

    facts = ("input_shape", "num_classes")


class OwnLoss(OwnPart):
    """A loss: a function of a model and a batch; see :mod:`raytorch.models.objectives`."""

    called_with: ClassVar[tuple[str, ...]] = ("the model", "a batch")


class OwnLoop(OwnPart):
    """A loop: a function of a :class:`~raytorch.training.run.Run`, in place of raytorch's."""

    called_with: ClassVar[tuple[str, ...]] = ("the run",)


class OwnEvaluation(OwnPart):
    """What follows each evaluation: a function of yours, called by rank 0 with the model as it was evaluated.

    Of ``step``, ``epoch``, ``metrics`` and ``writer``, TensorBoard's ``SummaryWriter``, it gets those that it has
    parameters for.
    """

    called_with: ClassVar[tuple[str, ...]] = ("the model",)


class OwnEvaluationSection(_ToldSection):
    """Base of the sections of such functions whose signature is known."""

    facts = ("step", "epoch", "metrics", "writer")
    giver = "the run"


def own_or_shipped(part: Any) -> str:
    """The tag of a part, by its name: ``own`` for a reference to a file, else ``shipped``."""
    name = part.get("name") if isinstance(part, dict) else getattr(part, "name", None)
    return "own" if isinstance(name, str) and is_reference(name) else "shipped"
