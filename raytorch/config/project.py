"""References to a user's own code, as ``nets.py:Net`` in a run's file: found and checked, but never run."""

import ast
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from raytorch.config import interactive_code
from raytorch.system.near_names import did_you_mean
from raytorch.system.python_files import (
    ProjectError,
    bindings,
    is_main_guard,
    is_taken,
    module_name,
    parse_source,
    read_source,
)
from raytorch.system.safe_text import escaped_line

_FORM = re.compile(r"([^:]+\.py):([^\W\d]\w*)")
JOB_MARK = ".raytorch-project"
"""File at the root of a project that was sent with a job, which has no ``.git``."""
MARKS = (".git", JOB_MARK)


@dataclass(frozen=True)
class Reference:
    """Something that a file of a project defines.

    Attributes:
        file: Path of the file from the project's root, with ``/``.
        name: What it is called at the file's top level.
    """

    file: str
    name: str

    def __str__(self) -> str:
        return f"{self.file}:{self.name}"


def is_reference(text: str) -> bool:
    """Tell whether a name is meant as a reference, be it a wrong one, rather than as the name of something shipped.

    Example:
        >>> is_reference("nets.py:Net"), is_reference("os:system"), is_reference("mlp")
        (True, True, False)
    """
    return any(mark in text for mark in ":./\\")


@dataclass(frozen=True)
class Project:
    """The folder that a user's own code is in: files outside it are not referred to, nor read through links."""

    root: Path
    texts: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Files that it has in memory, in place of those on the disk."""

    @classmethod
    def of(cls, folder: Path) -> "Project":
        """The project that a folder belongs to: the git repository, or job's folder, around it, else the folder."""
        folder = folder.resolve()
        above = (each for each in (folder, *folder.parents) for mark in MARKS if os.path.lexists(each / mark))
        return cls(next(above, folder))

    def resolve(self, text: str, folder: Path) -> Reference:
        """What ``text`` refers to in a configuration that is in ``folder``, from where, or else the root, it is found.

        Raises ProjectError for what is no ``FILE.py:NAME``, leads out of the project, is not there, cannot be imported
        or is not valid Python.

        Example:
            >>> project = Project.of(Path("configs"))
            >>> project.resolve("nets.py:Net", Path("configs"))
            Reference(file='configs/nets.py', name='Net')
        """
        path, name = _taken_apart(text)
        file = self._found(path, folder.resolve())
        _require_importable(file)
        body = self.parse(file).body
        top = bindings(body)
        if name not in top and "*" not in top:  # of a star import, which may bring anything
            guarded = bindings(each for guard in body if is_main_guard(guard) for each in guard.body)
            if name in guarded:
                raise ProjectError(
                    f'{file} has {name} below if __name__ == "__main__": alone, which workers that import the file do '
                    "not run; define it above"
                )
            advice = did_you_mean(name, top) or "; define it there"
            raise ProjectError(f"{file} has no {name} at its top level{advice}")
        return Reference(file, name)

    def having(self, texts: Mapping[str, str]) -> "Project":
        """The same project with more files in memory."""
        return replace(self, texts={**self.texts, **texts})

    def read(self, file: str) -> str:
        """The text of a file of the project. Raises ProjectError."""
        if file in self.texts:
            return self.texts[file]
        target = Path(os.path.realpath(self.root / file))
        if not target.is_relative_to(self.root.resolve()):
            raise ProjectError(
                f"{file} is a link, or behind one, that leads out of the project, to {target}; put a copy in its place"
            )
        return read_source(target, file)

    def is_file(self, file: str) -> bool:
        """Tell whether the project has a file."""
        return file in self.texts or os.path.isfile(self.root / file)  # noqa: PTH113 - which says no for what may not be asked

    def parse(self, file: str) -> ast.Module:
        """The syntax tree of a file of the project. Raises ProjectError."""
        return parse_source(self.read(file), file)

    def _found(self, path: PurePosixPath, folder: Path) -> str:
        root = self.root.resolve()
        for place in (folder / path, root / path):
            file = place.relative_to(root).as_posix() if place.is_relative_to(root) else None
            if file and (file in self.texts or os.path.lexists(place)):
                return file
        folders = [str(each) for each in dict.fromkeys((folder, root))]
        names = [name for each in folders for name in _python_files(Path(each, path.parent))]
        advice = did_you_mean(path.name, names) or "; give the path of one that is, from there"
        if path.name == interactive_code.FILE:
            advice = (
                ", and it is of a notebook or a prompt: go on there, where its classes are defined, or put the copy of "
                "it that is in the run's folder code here, as a file"
            )
        raise ProjectError(f"no file {escaped_line(path)} in {' or in '.join(folders)}{advice}")


def _taken_apart(text: str) -> tuple[PurePosixPath, str]:
    form = _FORM.fullmatch(text)
    if not form:
        raise ProjectError(
            f"must be FILE.py:NAME, as in nets.py:Net, not {text!r}: name a file of the project, and what it defines; "
            "what is installed is imported there"
        )
    path = PurePosixPath(form[1])
    if path.is_absolute():
        raise ProjectError(
            f"{escaped_line(path)} is an absolute path; give it from the configuration's or the project's folder"
        )
    if ".." in path.parts:
        raise ProjectError(f"{escaped_line(path)} has a '..'; give the path from the project's folder")
    return path, form[2]


def _require_importable(file: str) -> None:
    module = module_name(file)
    if is_taken(module):
        top = module.partition(".")[0]
        kind = "folder" if "/" in file else "file"
        raise ProjectError(f"{file} would hide the module {top}, which others import; rename the {kind}")


def _python_files(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir() if path.suffix == ".py")
    except OSError:
        return []
