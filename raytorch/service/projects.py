"""Which files of a project travel with a job, and what is left behind. Imports neither torch nor ray at its top."""

import codecs
import os
import stat
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from pathspec import GitIgnoreSpec

from raytorch.errors import PackageError
from raytorch.system.safe_text import escaped_line

NEVER_SENT = {"__pycache__", ".git"}
"""Folders that are no part of a project and are not missed."""
APART = {"node_modules"}
"""Folders that are no part of a project that is not under git."""
APART_AT_TOP = {"runs", "data"}
"""The same, directly in its folder; a package may have these names."""
IGNORE_FILE = ".rayignore"
MOST_FILES = 100_000
SHOWN = 5
_GIT_PLACES = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"}
"""Environment variables that name another repository than that of a folder."""


@dataclass(frozen=True)
class Project:
    """The files of a folder that a job needs."""

    root: Path
    files: dict[Path, Path] = field(default_factory=dict)
    """Where each file is here, by its path in the folder as the job sees it."""
    left_out: list[str] = field(default_factory=list)
    """What stays behind unasked, each with the reason."""

    def told(self) -> str:
        """Say what is left out, in a line: how much, and the first of it; nothing if there is none."""
        if not self.left_out:
            return ""
        more = f", and {len(self.left_out) - SHOWN:,} more" if len(self.left_out) > SHOWN else ""
        return f"not sent from {self.root}: {', '.join(self.left_out[:SHOWN])}{more}"


def collect_files(root: Path, besides: Path | None = None) -> Project:
    """Find the files of a project.

    Under git these are the tracked files and the new ones that it does not ignore, with those of submodules and of
    other repositories in the folder; elsewhere all but those in hidden folders, virtual environments, caches, and
    ``runs`` and ``data`` at the top. What a ``.rayignore`` lists stays out either way. A link is sent as what it leads
    to, if that is among these files; what is outside the folder never is.

    The file ``besides`` in it is sent whatever else is said of it, and wherever it leads.

    Raises PackageError if there are too many files or levels, one has a name that no archive can hold, or git or a
    ``.rayignore`` cannot be read.
    """
    root = root.resolve()
    project = Project(root)
    try:
        names = _without_ignored(root, sorted(_candidates(project, Path())))
        _Links(project, names).follow()
    except RecursionError:
        raise PackageError(
            f"{root} cannot be sent: folders in it, or links between them, are nested too deeply; move them out of it"
        ) from None
    if besides is not None:
        project.files.setdefault(besides, (root / besides).resolve())
    _require_names(project.files)
    return project


def shown(path: Path | str) -> str:
    """A path as text on one line, with escapes for bytes that are no UTF-8."""
    return escaped_line(str(path).encode(errors="surrogateescape").decode(errors="backslashreplace"))


def is_text(name: str) -> bool:
    """Tell whether a name is UTF-8, as archives and commands of jobs are."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Links:
    """Puts what links lead to where the links are: archives hold no links that nodes would unpack as such."""

    def __init__(self, project: Project, names: Iterable[Path]) -> None:
        self._project, self._root = project, project.root
        self._regular: list[Path] = []
        self._links: list[Path] = []
        for name in names:
            try:
                mode = (self._root / name).lstat().st_mode
            except FileNotFoundError:  # tracked by git, and deleted
                continue
            except OSError as error:
                _refuse_unreadable(error)
            if stat.S_ISREG(mode):
                self._regular.append(name)
            elif stat.S_ISLNK(mode):
                self._links.append(name)
            else:
                project.left_out.append(f"{shown(name)} (no regular file)")
        self._known = set(self._regular)
        self._told: set[Path] = set()
        self._followed = 0

    def follow(self) -> None:
        """Fill in the project's files."""
        for name, source in self._below(Path(), ()):
            self._project.files[name] = source
            self._require_few(len(self._project.files))

    def _require_few(self, count: int) -> None:
        if count > MOST_FILES:
            raise PackageError(
                f"{self._root} is too large to send: more than {MOST_FILES:,} files, those behind links included; "
                f"list what the job does not need in .gitignore or {IGNORE_FILE}"
            )

    def _below(self, folder: Path, behind: tuple[Path, ...]) -> Iterator[tuple[Path, Path]]:
        """The files in a folder, by their paths in it; ``behind`` are the folders whose links led there."""
        for name in self._regular:
            if name.is_relative_to(folder):
                yield name.relative_to(folder), self._root / name
        for link in self._links:
            if link.is_relative_to(folder):
                yield from ((link.relative_to(folder) / name, source) for name, source in self._target(link, behind))

    def _target(self, link: Path, behind: tuple[Path, ...]) -> Iterator[tuple[Path, Path]]:
        self._followed += 1  # links to folders of links lead to ever more, though there may be no file behind them
        self._require_few(self._followed)
        target = self._resolved(link)
        if target is None:
            return
        if target in self._known:
            yield Path(), self._root / target
        elif link.is_relative_to(target) or target in behind:
            self._leave(link, "leads in a circle")
        elif any(name.is_relative_to(target) for name in [*self._regular, *self._links]):
            yield from self._below(target, (*behind, target))
        else:
            self._leave(link, f"leads to {shown(target)}, which is not sent")

    def _resolved(self, link: Path) -> Path | None:
        """Where a link leads, as a path in the project; None if that is nowhere or elsewhere."""
        path = self._root / link
        try:
            target = path.resolve(strict=True)
        except FileNotFoundError:
            self._leave(link, "leads nowhere")
        except (OSError, RuntimeError):  # the latter for circles, before Python 3.13
            self._leave(link, "leads in a circle")
        else:
            if target.is_relative_to(self._root):
                return target.relative_to(self._root)
            self._leave(link, f"leads out of the project, to {shown(os.readlink(path))}")  # noqa: PTH115 - as it is written
        return None

    def _leave(self, link: Path, why: str) -> None:
        if link not in self._told:
            self._told.add(link)
            self._project.left_out.append(f"{shown(link)} ({why})")


def _candidates(project: Project, folder: Path) -> Iterator[Path]:
    """List what may belong to a project in one of its folders: files, links and whatever else has a name there."""
    listed = _listed_by_git(project.root / folder)
    if listed is None:
        yield from _walk(project, folder)
        return
    for name in listed:
        path = folder / name
        whole = project.root / path
        if whole.is_symlink() or not whole.is_dir():
            yield path
        elif (whole / ".git").exists():  # a submodule, or another repository
            yield from _candidates(project, path)
        else:
            project.left_out.append(f"{shown(path)} (a submodule that is not checked out)")


def _listed_by_git(folder: Path) -> list[str] | None:
    """Ask git about a folder; None if it is in no repository, or ignored by the one that it is in."""
    git = ["git", "-c", "core.fsmonitor=false", "-C", str(folder)]  # a repository can name a program there
    command = [*git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    environment = {key: value for key, value in os.environ.items() if key not in _GIT_PLACES} | {"LC_ALL": "C"}
    try:
        done = subprocess.run(command, capture_output=True, check=False, env=environment)  # noqa: S603
    except OSError:  # no git
        return None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        if "not a git repository" in said:
            return None
        raise PackageError(f"git cannot list the files of {folder}, so that none are sent: {said}")
    return sorted({os.fsdecode(name) for name in done.stdout.split(b"\0") if name}) or None


def _walk(project: Project, top: Path) -> Iterator[Path]:
    """All that is in a folder without git, but for folders that are no part of a project."""
    for folder, folders, files in os.walk(project.root / top, onerror=_refuse_unreadable):
        here = Path(folder)
        for name in sorted(folders):
            path = here / name
            if path.is_symlink():
                folders.remove(name)
                yield path.relative_to(project.root)
            elif why := _apart(path, project.root):
                folders.remove(name)
                if name not in NEVER_SENT:
                    project.left_out.append(f"{shown(path.relative_to(project.root))} ({why})")
        yield from ((here / name).relative_to(project.root) for name in files)


def _refuse_unreadable(error: OSError) -> NoReturn:
    raise PackageError(
        f"{shown(error.filename)} cannot be read: {error.strerror}; make it readable, or move it out of the project"
    ) from None


def _apart(folder: Path, root: Path) -> str | None:
    """Why a folder is no part of a project; None if it is."""
    if folder.name.startswith("."):
        return "hidden"
    if os.path.exists(folder / "pyvenv.cfg"):  # noqa: PTH110 - which says no for what may not be asked
        return "a virtual environment"
    names = NEVER_SENT | APART | (APART_AT_TOP if folder.parent == root else set())
    return "left out by its name" if folder.name in names else None


def _without_ignored(root: Path, names: list[Path]) -> list[Path]:
    """Leave out what the ``.rayignore`` in a folder says of the files below it, as Ray does itself with folders."""
    for folder in sorted({parent for name in names for parent in name.parents}):
        file = root / folder / IGNORE_FILE
        if file.is_file() and file.resolve().is_relative_to(root):
            rules = _rules(file)
            below = [name for name in names if name.is_relative_to(folder)]
            ignored = {name for name in below if rules.match_file(str(name.relative_to(folder)))}
            names = [name for name in names if name not in ignored]
    return names


def _rules(file: Path) -> GitIgnoreSpec:
    try:
        # In the bytes of the names of files, whatever encoding those are in.
        lines = os.fsdecode(file.read_bytes().removeprefix(codecs.BOM_UTF8)).replace("\r\n", "\n").split("\n")
        return GitIgnoreSpec.from_lines(lines, backend="simple")  # faster ones need UTF-8
    except (OSError, ValueError, LookupError) as error:
        raise PackageError(f"{file} cannot be read: {error}") from None


def _require_names(files: Iterable[Path]) -> None:
    """Refuse names that are no UTF-8, which an archive cannot hold."""
    odd = [shown(name) for name in files if not is_text(str(name))]
    if odd:
        more = f" and {len(odd) - SHOWN:,} more" if len(odd) > SHOWN else ""
        raise PackageError(
            f"file names that are no UTF-8 cannot be sent: {', '.join(odd[:SHOWN])}{more}; rename them, or list them "
            f"in {IGNORE_FILE}"
        )
