"""A run's own code: found where its file names it, checked by its signatures without being run, and read to be sent."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, create_model

from raytorch.config import yaml_tree as tree
from raytorch.config.code_snapshot import CodeSnapshot, snapshot
from raytorch.config.own_parts import OwnLoss, OwnModel, OwnModelSection, OwnPart
from raytorch.config.own_section import OwnSection, arguments_of, section_of
from raytorch.config.project import Project, Reference, is_reference
from raytorch.config.run import RunConfig
from raytorch.config.section import Section, name_alone
from raytorch.config.signature import signature_of
from raytorch.system.python_files import ProjectError

PARTS: dict[str, type[OwnPart]] = {"model": OwnModel, "loss": OwnLoss}
"""The keys of a run that may name code of the user's own."""


@dataclass(frozen=True)
class OwnCode:
    """The own code that a run's file names."""

    project: Project
    references: dict[str, Reference]
    """By key of the run."""
    nodes: dict[str, yaml.Node]
    """Where each is named."""

    @cached_property
    def schema(self) -> type[RunConfig]:
        """The schema of a run with these very parts. Raises ConfigError where their code can have no keys."""
        fields: dict[str, Any] = {}
        for key in self.references:
            fields[key] = (Annotated[self._section(key), BeforeValidator(name_alone)], ...)
        return create_model("RunConfig", __base__=RunConfig, **fields)

    def settled(self, config: RunConfig) -> RunConfig:
        """A run of :attr:`schema` as any other, with the code; its references are from the project's root.

        Raises ConfigError where code that they import cannot be read.
        """
        fields = {key: getattr(config, key) for key in RunConfig.model_fields}
        for key, reference in self.references.items():
            part = fields[key]
            arguments = arguments_of(part) if isinstance(part, OwnSection) else part.model_dump(exclude={"name"})
            fields[key] = PARTS[key](name=str(reference), **arguments)
        with placing(*next(iter(self.nodes.items()))):
            code = snapshot(self.project, self.references.values())
        return RunConfig.model_validate(fields).with_code(code)

    def _section(self, key: str) -> type[Section]:
        """The keys of a part; any where its signature is known only when it is run."""
        reference, node = self.references[key], self.nodes[key]
        with placing(key, node):
            signature = signature_of(self.project.read(reference.file), reference.name)
            if signature is None:
                return PARTS[key]
            if key == "model":
                return section_of(signature, node.value, base=OwnModelSection, skip=OwnModelSection.facts)
            return section_of(signature, node.value, skip=2)  # the model and a batch


def find_own_code(root: yaml.MappingNode, folder: Path) -> OwnCode | None:
    """The own code that a run's tree names from ``folder``; None if all is shipped. Raises ConfigError."""
    named = {key: tree.find(root, (key, "name")) for key in PARTS}
    nodes = {key: there.node for key, there in named.items() if not there.rest and is_own(there.node)}
    if not nodes:
        return None
    project = Project.of(folder)
    return OwnCode(project, {key: _resolved(project, key, node, folder) for key, node in nodes.items()}, nodes)


def settle_reference(node: yaml.Node, key: str, folder: Path) -> None:
    """Change the name of a part from ``folder`` to that from its project's root, if it is a user's own."""
    if is_own(node):
        node.value = str(_resolved(Project.of(folder), key, node, folder))


def is_own(node: yaml.Node) -> bool:
    """Tell whether a node names a part of a user's own."""
    return node.tag == tree.STR and is_reference(node.value)


@contextmanager
def placing(key: str, node: yaml.Node) -> Iterator[None]:
    """Tell what is wrong with own code as a problem of the part ``key`` of a run, which ``node`` names."""
    try:
        yield
    except ProjectError as error:
        raise tree.report([tree.Problem(node.start_mark, (key, "name"), str(error))]) from None


def _resolved(project: Project, key: str, node: yaml.Node, folder: Path) -> Reference:
    with placing(key, node):
        return project.resolve(node.value, folder)


def find_code(name: str, place: Path) -> CodeSnapshot:
    """The code of what a model's file names from its project's root; ``place`` is a file or folder of the project.

    Raises ProjectError if it is not there, or cannot be read.
    """
    file, place = PurePosixPath(name.partition(":")[0]), place.resolve()
    root = Project.of(place).root
    if place.parts[-len(file.parts) :] == file.parts:
        root = place.parents[len(file.parts) - 1]
    elif (place / file).is_file():
        root = place
    project = Project(root)
    return snapshot(project, [project.resolve(name, root)])
