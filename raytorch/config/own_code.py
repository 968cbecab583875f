"""A run's own code: found where its file names it, checked by its signatures without being run, and read to be sent."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from operator import or_
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, Discriminator, Tag, create_model

from raytorch.config import yaml_tree as tree
from raytorch.config.code_snapshot import CodeSnapshot, changed_files, masked_copies, snapshot
from raytorch.config.data import SOURCE_NAMES
from raytorch.config.live_code import is_live, live_project, recalled
from raytorch.config.metrics import Metric, OwnMetric, OwnMetricSection
from raytorch.config.own_parts import (
    OwnData,
    OwnDataSection,
    OwnEvaluation,
    OwnEvaluationSection,
    OwnLoop,
    OwnLoss,
    OwnModel,
    OwnModelSection,
    OwnPart,
    ShownModelSection,
)
from raytorch.config.own_section import OwnSection, arguments_of, section_of
from raytorch.config.project import Project, Reference, is_reference
from raytorch.config.run import RunConfig
from raytorch.config.section import Section, name_alone
from raytorch.config.signature import REQUIRED, Signature, signature_of
from raytorch.system.python_files import ProjectError

PARTS: dict[str, type[OwnPart]] = {
    "data": OwnData,
    "model": OwnModel,
    "loss": OwnLoss,
    "loop": OwnLoop,
    "metrics": OwnMetric,
    "on_evaluation": OwnEvaluation,
}
"""The keys of a run that may name code of the user's own; ``metrics`` is a list of such parts."""
_NOUNS: dict[type[OwnPart], str] = {
    OwnData: "a data set",
    OwnLoss: "a loss",
    OwnLoop: "a loop",
    OwnMetric: "a metric",
    OwnEvaluation: "what follows an evaluation",
}


@dataclass(frozen=True)
class OwnCode:
    """The own code that a run's file names."""

    project: Project
    references: dict[tree.Key, Reference]
    """By key of the run: ``("model",)``, ``("metrics", 0)``."""
    nodes: dict[tree.Key, yaml.Node]
    """Where each is named."""
    are_facts_known: bool
    """Whether the data is published, of which the facts that it tells a model are known before it is read."""

    @cached_property
    def code(self) -> CodeSnapshot:
        """The code itself. Raises ConfigError where what it imports cannot be read."""
        with placing(*next(iter(self.nodes.items()))):
            return snapshot(self.project, self.references.values())

    @cached_property
    def schema(self) -> type[RunConfig]:
        """The schema of a run with these very parts. Raises ConfigError where their code can have no keys."""
        sections = {key: self._section(key) for key in self.references}
        fields: dict[str, Any] = {
            str(key[0]): (Annotated[section, BeforeValidator(name_alone)], ...)
            for key, section in sections.items()
            if key[1:] == ()
        }
        metrics = [Annotated[section, Tag(self.nodes[key].value)] for key, section in sections.items() if key[1:]]
        if metrics:
            fields["metrics"] = (list[_one_of(metrics)], ...)  # type: ignore[misc]
        return create_model("RunConfig", __base__=RunConfig, **fields)

    def settled(self, config: RunConfig) -> RunConfig:
        """A run of :attr:`schema` as any other, with the code; its references are from the project's root.

        Raises ConfigError where code that they import cannot be read.
        """
        fields: dict[str, Any] = {key: getattr(config, key) for key in RunConfig.model_fields}
        fields["metrics"] = list(config.metrics)
        for (name, *place), reference in self.references.items():
            key = str(name)
            parts: Any = fields[key] if place else fields
            at = place[0] if place else key
            parts[at] = _settled(PARTS[key], parts[at], reference)
        return RunConfig.model_validate(fields).with_code(self.code)

    def _section(self, key: tree.Key) -> type[Section]:
        """The keys of a part; any where its signature is known only when it is run."""
        reference, node, part = self.references[key], self.nodes[key], PARTS[str(key[0])]
        with placing(key, node):
            signature = signature_of(self.project.read(reference.file), reference.name)
            if signature is None:
                return part
            section = partial(section_of, signature, node.value)
            if part is OwnMetric and _makes_a_metric(signature):
                return section(base=OwnMetricSection)
            _require_positional(part, reference, signature)
            skip = len(part.called_with)
            match key[0]:
                case "model" if not self.are_facts_known:  # which may give it any of its parameters
                    required = [each.name for each in signature.parameters if each.default is REQUIRED]
                    return section(base=OwnModelSection, optional=required)
                case "model":
                    return section(base=ShownModelSection, skip=ShownModelSection.facts)
                case "on_evaluation":
                    given = {*signature.by_position[:skip], *OwnEvaluationSection.facts}
                    return section(base=OwnEvaluationSection, skip=given)
                case "data":
                    return section(base=OwnDataSection, skip=skip)
                case "metrics":
                    return section(base=OwnMetricSection, skip=skip)
                case _:
                    return section(skip=skip)


def _makes_a_metric(signature: Signature) -> bool:
    """Tell whether it is a class, or a function of keywords alone; see :mod:`raytorch.models.stateful_metrics`."""
    names = {parameter.name for parameter in signature.parameters}
    takes_a_batch = signature.by_position or signature.any_more or names & {"model", "batch"}
    return signature.is_class or not takes_a_batch


def _require_positional(part: type[OwnPart], reference: Reference, signature: Signature) -> None:
    """Refuse what cannot be called as such a part is. Raises ProjectError."""
    count = len(part.called_with)
    if part is OwnLoss and signature.is_class:
        raise ProjectError(
            f"a loss is a function that is called with the model and a batch, and {reference} (line {signature.line}) "
            "is a class; write a function, which may call one"
        )
    if len(signature.by_position) < count and not signature.any_more:
        remedy = ", or one of keywords alone that makes a torchmetrics.Metric" if part is OwnMetric else ""
        raise ProjectError(
            f"{_NOUNS[part]} is called with {' and '.join(part.called_with)}, and {reference} (line {signature.line}) "
            f"does not take {count} argument{'s' if count > 1 else ''} by position; write one that does{remedy}"
        )
    given = [words.split()[-1] for words in part.called_with]  # "the split"
    taken = signature.by_position[:count]
    others = {each.name for each in signature.parameters} if part is OwnData else set(taken)
    if misplaced := [name for place, name in enumerate(given) if name in others and [name] != taken[place : place + 1]]:
        raise ProjectError(
            f"{_NOUNS[part]} is called with {' and '.join(part.called_with)} by position, and {reference} (line "
            f"{signature.line}) has {' and '.join(misplaced)} in another place; let it take {' and '.join(given)} first"
        )


def _settled(kind: type[OwnPart], part: Any, reference: Reference) -> OwnPart:
    """A part of a strict schema as one that names its code from the project's root."""
    arguments = arguments_of(part) if isinstance(part, OwnSection) else part.arguments
    keys = {key: getattr(part, key) for key in kind.model_fields if key != "name"}
    return kind(name=str(reference), **keys, **arguments)


def _one_of(own: list[Any]) -> Any:
    """The type of a metric that is one of ``own``, by its name, or a shipped one."""
    shipped: Any = Annotated[Metric, Tag("shipped")]
    kinds = reduce(or_, own, shipped)
    return Annotated[kinds, Discriminator(_own_name), BeforeValidator(name_alone)]


def _own_name(part: Any) -> str:
    name = part.get("name") if isinstance(part, dict) else getattr(part, "name", None)
    return name if isinstance(name, str) and is_reference(name) else "shipped"


Found = dict[tuple[tuple[tree.Key, str], ...], OwnCode]
"""The own code of runs that name it from one folder, by their parts and names."""


def find_own_code(
    root: yaml.MappingNode, folder: Path, project: Project | None = None, found: Found | None = None
) -> OwnCode | None:
    """The own code that a run's tree names from ``folder``; None if all is shipped. Raises ConfigError.

    Args:
        root: The run's tree.
        folder: Where its names are looked for.
        project: Where that is, by default the one that the folder belongs to.
        found: What was found from there for other runs. It is taken from here, and added.
    """
    found = {} if found is None else found
    listed = tree.find(root, ("metrics",))
    count = len(listed.node.value) if isinstance(listed.node, yaml.SequenceNode) and not listed.rest else 0
    alone = (key for key in PARTS if key != "metrics")
    keys: list[tree.Key] = [*((key,) for key in alone), *(("metrics", number) for number in range(count))]
    named = {key: tree.find(root, (*key, "name")) for key in keys}
    nodes = {key: there.node for key, there in named.items() if not there.rest and is_own(there.node)}
    if ("loop",) in nodes:  # no other part is of any use then, which the run says
        nodes = {("loop",): nodes["loop",]}
    if not nodes:
        return None
    data = named["data",]
    are_facts_known = ("data",) not in nodes and (bool(data.rest) or data.node.value not in SOURCE_NAMES)
    names = (*((key, node.value) for key, node in nodes.items()), ((), str(are_facts_known)))
    if names not in found:
        project = project or Project.of(folder)
        references = {key: _resolved(project, key, node, folder) for key, node in nodes.items()}
        found[names] = OwnCode(project, references, nodes, are_facts_known)
    return found[names]


def settle_reference(node: yaml.Node, key: tree.Key, folder: Path) -> None:
    """Change the name of a part from ``folder`` to that from its project's root, if it is a user's own."""
    if is_own(node):
        node.value = str(_resolved(Project.of(folder), key, node, folder))


def is_own(node: yaml.Node) -> bool:
    """Tell whether a node names a part of a user's own."""
    return node.tag == tree.STR and is_reference(node.value)


@contextmanager
def placing(key: tree.Key, node: yaml.Node) -> Iterator[None]:
    """Tell what is wrong with own code as a problem of the part at ``key`` of a run, which ``node`` names."""
    try:
        yield
    except ProjectError as error:
        raise tree.report([tree.Problem(node.start_mark, (*key, "name"), str(error))]) from None


def _resolved(project: Project, key: tree.Key, node: yaml.Node, folder: Path) -> Reference:
    with placing(key, node):
        return project.resolve(node.value, folder)


Code = str | PathLike[str] | CodeSnapshot | Callable[..., Any] | None
"""The code of a part of a user's own, or the file or folder that has it, or the class or function itself."""


def same_code(name: str, digests: Mapping[str, str], code: Code) -> CodeSnapshot:
    """The code of what is named from its project's root, if its files have these digests. Raises ProjectError."""
    if code is None:
        raise ProjectError(
            f"it is of {name}, a model of your own, and holds no code: give the file or folder that has it, as "
            f"code={name.partition(':')[0]!r}"
        )
    there = code if isinstance(code, CodeSnapshot) else _of_live(code) if is_live(code) else _find(name, _path(code))
    if name.rpartition(":")[0] not in there.sources:
        raise ProjectError(f"it is of {name}, and the code in {there.root} has no such file")
    there = there.needed_by(name)
    if changes := changed_files(digests, there.digests()):
        raise ProjectError(
            f"it was saved by other code than that in {there.root}: {', '.join(changes)}; give that of then, of which "
            f"a run keeps a copy in its folder code{masked_copies(there, changes)}"
        )
    return there


def _path(code: Any) -> Path:
    try:
        return Path(code)
    except TypeError:
        kind = type(code).__name__
        raise ProjectError(f"code is a {kind}; give a class or function, or the file or folder that has it") from None


def _of_live(value: Any) -> CodeSnapshot:
    return snapshot(*live_project([value], Path()))


def _find(name: str, place: Path) -> CodeSnapshot:
    """The code of what is named, of the project that ``place`` is the root of, or a folder in; or the file itself.

    A file of weights names no other file than that of the user's choice, where that is a file.
    """
    # The name of a file is its own, also where it is a link to another one.
    place = place.parent.resolve() / place.name if place.is_file() else place.resolve()
    file = PurePosixPath(name.partition(":")[0])
    is_named = not file.is_absolute() and place.parts[-len(file.parts) :] == file.parts
    if place.is_file() and not is_named:
        raise ProjectError(f"it is of {name}, and {place} is another file; give that, or the folder that has it")
    root = Project.of(place).root
    if is_named:
        root = place.parents[len(file.parts) - 1]
    elif Project(place).is_file(str(file)):
        root = place
    project = recalled(Project(root), [name])
    return snapshot(project, [project.resolve(name, root)])
