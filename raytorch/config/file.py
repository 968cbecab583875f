"""A run's YAML file: read, override, check and write it; each problem is one line that says where and what is allowed.

The file becomes a tree of nodes that know where they stand. Overrides are grafted into it, and so one tree tells where
a value that pydantic refuses came from. What is allowed instead is read off the JSON schema.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from raytorch.config import yaml_tree as tree
from raytorch.config.code_snapshot import CodeSnapshot
from raytorch.config.in_python import no_data, plain, read_python, told_apart
from raytorch.config.json_schema import whole_schema
from raytorch.config.live_code import is_live, recalled, remembered
from raytorch.config.messages import explain, must_be
from raytorch.config.own_code import Found, find_own_code
from raytorch.config.project import Project
from raytorch.config.run import RunConfig
from raytorch.config.section import Section, tell_mistakes_by
from raytorch.errors import ConfigError
from raytorch.system.python_files import ProjectError

Config = TypeVar("Config", bound=Section)
_LEAST = "give at least epochs or steps"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the run that a YAML file describes.

    An override is written ``KEY=VALUE``: a dotted key, and a value in YAML. It wins over the file and over overrides
    before it, and leaves the rest of its section as it is.

    Raises ConfigError, whose message has a line for each problem. It starts with ``FILE:LINE: KEY:``, or with
    ``override KEY=VALUE: KEY:`` where an override is to blame.
    """
    return _changed(read(path, RunConfig, _LEAST), overrides, Path(path).parent)


def from_data(
    data: Mapping[str, Any], overrides: Sequence[str] = (), folder: Path | None = None, project: Project | None = None
) -> RunConfig:
    """As :func:`load_config`, of a dictionary; own code is found from ``folder``, by default the current one.

    A class or function may stand where a reference to it would, with ``project`` for other references.
    """
    known = {key: value if key in RunConfig.model_fields else None for key, value in data.items()}
    given = read_python(known, folder or Path())
    root = compose(_written(given.content).encode(), tree.DICTIONARY, RunConfig, _LEAST)
    config = _changed(root, overrides, folder or Path(), given.project or project)
    for part in given.parts:
        part.require_arguments()
    return config


def with_own_code(config: RunConfig, overrides: Sequence[str] = (), code: CodeSnapshot | None = None) -> RunConfig:
    """What a run has recorded, changed, with the code that its own parts name, as the current folder's project has it.

    With ``code`` as the project that this is of. Raises ConfigError if it is not there, or does not take the
    configuration's arguments.
    """
    content, project = config.model_dump(mode="json"), remembered(code) if code else Project.of(Path())
    if config.references:
        try:
            project = recalled(project, config.references)
            config = from_data(content, (), project.root, project)
        except (ConfigError, ProjectError) as error:
            raise ConfigError(
                f"{config.name} is of code of your own, which is looked for in the project of the current folder: "
                f"{error}"
            ) from None
    return from_data(content, overrides, project.root, project) if overrides else config


def one_line(value: Any, key: str = "the value") -> str:
    """A value as an override has it behind its ``key``. Raises ConfigError: YAML has no word for it."""
    return _written([value], key).strip()[1:-1]


def _written(data: Any, key: str = "") -> str:
    try:
        return tree.dump(plain(data))
    except yaml.YAMLError as error:
        if found := no_data(plain(data[0] if key else data), key):
            raise tree.invalid(f"{tree.DICTIONARY}: {told_apart(*found)}") from None
        reason = f"{error.args[0]}: {error.args[-1]!r}"
    except (RecursionError, TypeError, ValueError) as error:  # a list in itself, a class, a number without end
        reason = f"cannot be written as YAML: {error}"
    raise tree.invalid(f"{reason}; give plain numbers, texts, lists and mappings")


def _changed(
    root: yaml.MappingNode, overrides: Sequence[str], folder: Path, project: Project | None = None
) -> RunConfig:
    for override in overrides:
        apply_override(root, override, RunConfig)
    return validate_run(root, folder, project)


def dump_config(config: Section) -> str:
    """Write a run in full, defaults included, as YAML that :func:`load_config` reads back to an equal run."""
    return tree.dump(config.model_dump(mode="json"))


def read(path: str | Path, kind: type[Section], least: str) -> yaml.MappingNode:
    """The tree of a file, which has to be a mapping; ``least`` says what an empty one lacks. Raises ConfigError."""
    try:
        with open(path, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
            os.set_blocking(file.fileno(), True)  # waits for who writes to a pipe, as <(...) is; nobody is its end
            raw = file.read(tree.LARGEST + 1)  # of a device without end, say
    except FileNotFoundError:
        raise tree.invalid(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: the path holds a null character
        raise tree.invalid(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return compose(raw, str(path), kind, least)


def compose(raw: bytes, name: str, kind: type[Section], least: str) -> yaml.MappingNode:
    """As :func:`read`, of the content of the file ``name``."""
    tree.check_size(len(raw), name)
    try:
        root = tree.compose(raw.decode(), name)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise tree.invalid(f"{name}:{line}: not UTF-8; save the file as UTF-8") from None
    if root is None:
        raise tree.invalid(f"{name}: the file is empty; {least}")
    if not isinstance(root, yaml.MappingNode):
        raise tree.report([tree.Problem(root.start_mark, (), must_be([whole_schema(kind)], root))])
    return root


def parse(raw: bytes, name: str, kind: type[Config]) -> Config:
    """The configuration in the content of the file ``name``. Raises ConfigError."""
    return validate(compose(raw, name, kind, "it is damaged"), kind)


def validate_run(
    root: yaml.MappingNode, folder: Path, project: Project | None = None, found: Found | None = None
) -> RunConfig:
    """The run that a tree stands for, with the own code that it names from ``folder``. Raises ConfigError.

    ``project`` and ``found`` are as for :func:`raytorch.config.own_code.find_own_code`.
    """
    own = find_own_code(root, folder, project, found)
    return own.settled(validate(root, own.schema)) if own else validate(root, RunConfig)


def validate(root: yaml.MappingNode, kind: type[Config]) -> Config:
    """The configuration that a tree stands for. Raises ConfigError where it does not fit ``kind``."""
    try:
        return kind.model_validate(tree.construct(root))
    except ValidationError as error:
        raise _explained(error, root, kind) from None


def _explained(error: ValidationError, root: yaml.MappingNode, kind: type[Section]) -> ConfigError:
    details = error.errors(include_url=False, include_input=False)
    told, untold = details[: tree.MOST_PROBLEMS], details[tree.MOST_PROBLEMS :]
    return tree.report([explain(each, root, whole_schema(kind)) for each in told], len(untold))


def refused_in_python(kind: type[Section], data: Mapping[str, Any], error: ValidationError) -> ConfigError:
    """What is wrong with ``data`` for a section that is made in Python, as it would be told of a file."""
    if any(map(is_live, data.values())):
        return tree.invalid(
            f"{tree.DICTIONARY}: classes and functions are taken by raytorch.load, as in raytorch.load(model=Net), and "
            "by raytorch.train"
        )
    try:
        root = compose(_written(dict(data)).encode(), tree.DICTIONARY, kind, _LEAST)
    except ConfigError as unwritten:
        return unwritten
    return _explained(error, root, kind)


tell_mistakes_by(refused_in_python)


def apply_override(root: yaml.MappingNode, override: str, kind: type[Section]) -> None:
    """Graft the value of ``optimizer.lr=0.01`` into the tree of a configuration. Raises ConfigError."""
    name = tree.OVERRIDE + override
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(key and key.isprintable() for key in keys):
        raise tree.invalid(f"{name}: must be KEY=VALUE, such as optimizer.lr=0.01")
    mark = tree.mark_at(name)
    graft(root, keys, tree.compose(text, name, tuple(keys)) or tree.scalar("", mark, tree.NULL), mark, kind)


def graft(root: yaml.MappingNode, keys: list[str], value: yaml.Node, mark: yaml.Mark, kind: type[Section]) -> None:
    """Put ``value`` where ``keys`` lead, in new mappings at ``mark``: what shares the old ones stays as it is."""
    mapping = root
    fields: Mapping[str, Any] = kind.model_fields
    for key in keys[:-1]:
        field = fields.get(key)
        mapping = _open(mapping, tree.scalar(key, mark), default=getattr(field and field.default, "name", None))
        fields = getattr(field and field.annotation, "model_fields", {})
    tree.put(mapping, tree.scalar(keys[-1], mark), value)


def _open(parent: yaml.MappingNode, key: yaml.ScalarNode, default: str | None) -> yaml.MappingNode:
    """Make the value of ``key`` a mapping to write into: a copy, since aliases may share what is there.

    A name that stands alone goes under ``name``, and so does ``default`` where nothing stands.
    """
    old_key, value = tree.pair(parent, key.value) or (key, None)
    if isinstance(value, yaml.MappingNode):
        key, pairs = old_key, list(value.value)
    elif isinstance(value, yaml.ScalarNode) and value.tag == tree.STR:
        key, pairs = old_key, [(tree.scalar("name", value.start_mark), value)]
    else:
        pairs = [(tree.scalar("name", key.start_mark), tree.scalar(default, key.start_mark))] if default else []
    mapping = yaml.MappingNode(tree.MAP, pairs, key.start_mark, key.end_mark)
    tree.put(parent, key, mapping)
    return mapping
