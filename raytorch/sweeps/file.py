"""A sweep's YAML file: the run that it varies stands in it or in a file of its own, and every trial is checked.

What a trial's parameters break is told like any other mistake, with the line of the parameter.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from raytorch.config import ConflictError, Parameter, RunConfig, SweepConfig
from raytorch.config import yaml_tree as tree
from raytorch.config.file import apply_override, compose, graft, read, validate, validate_run
from raytorch.config.own_code import PARTS, Found, settle_reference
from raytorch.config.project import Project
from raytorch.errors import ConfigError

LEAST = "give a run and its parameters"


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    number: int
    """Its place in the sweep, from 0."""
    parameters: dict[str, Any]
    """The values of the keys that vary."""
    config: RunConfig
    """The run with these values."""

    @property
    def name(self) -> str:
        """Name of its folder in the sweep's."""
        return f"trial-{self.number:03}"


@dataclass(frozen=True)
class Sweep:
    """Content of a sweep's file: the same whenever it is read, since a seed decides what is drawn."""

    config: SweepConfig
    trials: tuple[Trial, ...]


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep, draw its trials and check each.

    Args:
        path: The sweep's file.
        overrides: Changes as :func:`raytorch.config.file.load_config` takes them: ``trials=4``, ``run.epochs=2``.

    Raises:
        ConfigError: The file, the run's file, an override or a trial is invalid; see
        :func:`raytorch.config.file.load_config`.

    Example:
        >>> sweep = load_sweep("configs/sweeps/digits.yaml", ["trials=4"])
    """
    root = read(path, SweepConfig, LEAST)
    folder = _insert_run(root, Path(path).parent)
    for override in overrides:
        apply_override(root, override, SweepConfig)
    _settle_references(root, folder)
    return _drawn(root, Project.of(folder).root)


def recorded_sweep(raw: bytes, name: str) -> Sweep:
    """The sweep in the content of a sweep's record, the file ``name``, which has the run in it and names no file.

    Code of the user's own is found in the project of the current folder.
    """
    return _drawn(compose(raw, name, SweepConfig, LEAST), Project.of(Path()).root)


def _drawn(root: yaml.MappingNode, folder: Path) -> Sweep:
    """The sweep of a tree, whose run names own code from ``folder``, its project's root."""
    config = validate(root, SweepConfig)
    found: Found = {}  # read once, however many trials there are
    for parameters in config.probes():
        _vary(root, config, parameters, folder, found)
    drawn = enumerate(config.draw())
    return Sweep(config, tuple(Trial(number, each, _vary(root, config, each, folder, found)) for number, each in drawn))


def is_sweep(path: str | Path) -> bool:
    """Tell whether a file is of a sweep rather than of a run: whether it has parameters."""
    try:
        root = read(path, SweepConfig, LEAST)
    except ConfigError:
        return False
    return tree.pair(root, "parameters") is not None


def _insert_run(root: yaml.MappingNode, folder: Path) -> Path:
    """Put the run's tree in place of its file's name; its keys still know the line of the file that they are in.

    Returns the folder of the run's file, or the sweep's if that has the run in it.
    """
    key, value = tree.pair(root, "run") or (None, None)
    if key and isinstance(value, yaml.ScalarNode) and value.tag == tree.STR:
        try:
            run = read(folder / Path(value.value).expanduser(), RunConfig, "give at least epochs or steps")
        except ConfigError as error:
            raise tree.invalid(
                *(f"{tree.at(key.start_mark)}: run: {line}" for line in str(error).split("\n"))
            ) from None
        tree.put(root, key, run)
        return (folder / Path(value.value).expanduser()).parent
    return folder


def _settle_references(root: yaml.MappingNode, folder: Path) -> None:
    """Name own code from its project's root, as the sweep's record does, whatever folder it is read from again."""
    for key in PARTS:
        places: list[tree.Key] = [("run", key)]
        for name in (key, f"{key}.name"):
            for kind in ("grid", "choice"):
                places += _items(root, ("parameters", name, kind))
        if key == "metrics":
            places = [item for place in places for item in _items(root, place)]
        for place in places:
            there = tree.find(root, (*place, "name"))
            if not there.rest:
                settle_reference(there.node, (key, place[-1]) if key == "metrics" else (key,), folder)


def _items(root: yaml.MappingNode, place: tree.Key) -> list[tree.Key]:
    """The places of the items of a list, if there is one."""
    there = tree.find(root, place)
    is_list = isinstance(there.node, yaml.SequenceNode) and not there.rest
    return [(*place, number) for number in range(len(there.node.value))] if is_list else []


def _vary(
    root: yaml.MappingNode, config: SweepConfig, parameters: dict[str, Any], folder: Path, found: Found
) -> RunConfig:
    """The run with these values of its keys; of a key and one inside it, the inner is set last and so has its say."""
    base = tree.find(root, ("run",)).node
    run = yaml.MappingNode(tree.MAP, list(base.value), base.start_mark, base.end_mark)
    grafted: dict[tuple[str, ...], yaml.Node] = {}
    for key in sorted(parameters, key=lambda key: key.count(".")):
        keys, place = tuple(key.split(".")), tree.find(root, ("parameters", key))
        for outer, node in grafted.items():
            inner = keys[len(outer) :]
            if keys[: len(outer)] == outer and not tree.find(node, inner).rest:
                text = f"parameters.{tree.dotted(outer)} sets it too; leave it out of one of them"
                raise tree.report([tree.Problem(place.mark, keys, text)])
        grafted[keys] = _node(root, config.parameters[key], key, parameters[key])
        graft(run, list(keys), grafted[keys], place.mark, RunConfig)
    trial = validate_run(run, folder, found=found)
    try:
        ranking = trial.ranking_by(config.ranking.label)
    except ConflictError as error:
        mark = tree.find(root, ("metric",)).mark
        raise tree.report([tree.Problem(mark, ("metric",), f"a trial lacks it: {error}")]) from None
    if ranking != config.ranking:
        mark = tree.find(root, ("parameters", "metrics")).mark
        text = (
            f"of {ranking.label} the better of two values is another in a trial than in the run; leave one of them out"
        )
        raise tree.report([tree.Problem(mark, ("metrics",), text)])
    return trial


def _node(root: yaml.MappingNode, parameter: Parameter, key: str, value: Any) -> yaml.Node:
    """The node in which a listed value stands, or a new one for a number that was drawn."""
    if not parameter.is_listed:
        mark = tree.find(root, ("parameters", key)).mark
        return tree.scalar(repr(value), mark, tree.INT if isinstance(value, int) else tree.FLOAT)
    # By identity, for to Python 1, 1.0 and True are equal.
    number = next(number for number, listed in enumerate(parameter.values) if listed is value)
    return tree.find(root, ("parameters", key, parameter.kind, number)).node
