"""The user's own code that a run needs, as texts, collected by following its import statements."""

import ast
import hashlib
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from raytorch.config import interactive_code
from raytorch.config.project import Project, Reference
from raytorch.system.python_files import ProjectError, is_taken, parse_source
from raytorch.system.safe_text import without_secrets

MOST_FILES = 2_000
MOST_BYTES = 20_000_000
MASKED = "# raytorch: *** stands for secrets in this copy; to use it, put them back and take this line away"
"""Last line of a copy that differs from the file, and so from its digest."""


@dataclass(frozen=True)
class CodeSnapshot:
    """The texts of the files that references need, each with line feeds alone and without a byte order mark.

    Attributes:
        root: The project's folder, on the machine where this was made.
        sources: The text of each file, by its path from there.
        entries: The files that are referred to, in whose folders modules are found as well.
    """

    root: str
    sources: dict[str, str]
    entries: tuple[str, ...] = ()

    def digests(self) -> dict[str, str]:
        """The SHA-256 of each file, in UTF-8."""
        return {file: hashlib.sha256(text.encode()).hexdigest() for file, text in self.sources.items()}

    def copies(self) -> dict[str, str]:
        """The text of each file as records have it: without the secrets of addresses, of which a last line tells.

        Example:
            >>> CodeSnapshot("/project", {"net.py": "store = 's3://key:secret@bucket'"}).copies()["net.py"].splitlines()[0]
            "store = 's3://***@bucket'"
        """
        return {file: _copy(text) for file, text in self.sources.items()}

    def needed_by(self, reference: str) -> "CodeSnapshot":
        """The part of it that a snapshot for ``FILE.py:NAME`` alone would have."""
        file, _, name = reference.rpartition(":")
        sources = self.sources
        if PurePosixPath(file).name == interactive_code.FILE:
            sources = {**sources, file: interactive_code.reduced(sources[file], name)}
        return _collected(self.root, sources.__getitem__, sources.__contains__, (file,))


def snapshot(project: Project, references: Iterable[Reference]) -> CodeSnapshot:
    """The files that are referred to, with every file of the project that their import statements name, at any depth.

    Raises ProjectError for a file that cannot be read or is not valid Python, for an import that means either of two
    files, and where there is too much of it.

    Example:
        >>> project = Project.of(Path("."))
        >>> sorted(snapshot(project, [Reference("nets/tagger.py", "Tagger")]).sources)
        ['nets/__init__.py', 'nets/layers.py', 'nets/tagger.py']
    """
    entries = tuple(sorted({reference.file for reference in references}))
    return _collected(str(project.root.resolve()), project.read, project.is_file, entries)


def _collected(
    root: str, read: Callable[[str], str], is_file: Callable[[str], bool], entries: tuple[str, ...]
) -> CodeSnapshot:
    sources = _Collection(root, read, is_file, entries).sources
    return CodeSnapshot(root, dict(sorted(sources.items())), entries)


def changed_files(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What differs between the digests of two snapshots, a sentence for each file.

    Example:
        >>> changed_files({"nets.py": "0a", "old.py": "1b"}, {"nets.py": "2c"})
        ['nets.py has changed', 'old.py is gone']
    """
    return [
        f"{file} {'is new' if file not in before else 'is gone' if file not in now else 'has changed'}"
        for file in sorted(before.keys() | now.keys())
        if before.get(file) != now.get(file)
    ]


def masked_copies(code: CodeSnapshot, changed: Iterable[str]) -> str:
    """The end of a message about code that has changed: which of its files are copies without their secrets, if any."""
    files = [file for file, text in code.sources.items() if MASKED in text]
    told = [file for file in files if any(change.startswith(f"{file} ") for change in changed)]
    if not told:
        return ""
    return f"; in {', '.join(told)} *** stands for secrets: put them back, and take the line away that says so"


def _copy(text: str) -> str:
    masked = without_secrets(text)
    return text if masked == text else f"{masked.removesuffix(chr(10))}\n{MASKED}\n"


@dataclass(frozen=True)
class _Import:
    """A statement that imports ``module``, or names from it, relative to the package that is ``level`` up."""

    line: int
    module: str
    names: tuple[str, ...] = ()
    level: int = 0

    @property
    def modules(self) -> tuple[str, ...]:
        """All that may be modules."""
        within = [f"{self.module}.{name}" if self.module else name for name in self.names]
        return tuple(filter(None, (self.module, *within)))


class _Collection:
    """Follows the imports from file to file."""

    def __init__(
        self, root: str, read: Callable[[str], str], is_file: Callable[[str], bool], entries: Iterable[str]
    ) -> None:
        self._root, self._text_of, self._is_file = root, read, is_file
        self._beside = sorted({posixpath.dirname(entry) for entry in entries} - {""})
        self._found_beside: dict[str, tuple[str, str]] = {}
        self.sources: dict[str, str] = {}
        self._size = 0
        waiting = list(entries)
        while waiting:
            file = waiting.pop()
            if file not in self.sources:
                waiting += [*self._packages(file), *self._imported(file, self._read(file))]
        self._require_the_same_found_at_the_root()

    def _read(self, file: str) -> str:
        text = self.sources[file] = self._text_of(file)
        self._size += len(text.encode())
        if len(self.sources) > MOST_FILES or self._size > MOST_BYTES:
            raise ProjectError(
                f"the code that is imported has more than {MOST_FILES:,} files or {MOST_BYTES:,} bytes; install what "
                "is not the project's own, and import it from there"
            )
        return text

    def _packages(self, file: str) -> Iterator[str]:
        while file := posixpath.dirname(file):
            if self._is_file(f"{file}/__init__.py"):
                yield f"{file}/__init__.py"

    def _imported(self, file: str, text: str) -> Iterator[str]:
        for statement in _imports(parse_source(text, file)):
            if statement.level:
                yield from self._relative(file, statement)
            elif not is_taken(statement.module):
                yield from self._absolute(file, statement)

    def _relative(self, file: str, statement: _Import) -> Iterable[str]:
        package = PurePosixPath(file).parents[:-1]  # from the innermost one up; the root is none
        return self._files(str(package[statement.level - 1]), statement) if statement.level <= len(package) else ()

    def _absolute(self, file: str, statement: _Import) -> list[str]:
        found = {folder: files for folder in ("", *self._beside) if (files := self._files(folder, statement))}
        if len(found) > 1:
            first, second, *_ = (files[0] for files in found.values())
            raise ProjectError(
                f"{file}:{statement.line}: {statement.module} means both {first} and {second}; rename one of them"
            )
        [(folder, files)] = found.items() or [("", [])]
        if folder:
            self._found_beside[statement.module.partition(".")[0]] = f"{file}:{statement.line}", files[0]
        return files

    def _files(self, folder: str, statement: _Import) -> list[str]:
        paths = [posixpath.join(folder, module.replace(".", "/")) for module in statement.modules]
        if not statement.module:
            paths = [folder, *paths]
        either = [(f"{path}/__init__.py", f"{path}.py") for path in paths]
        return [file for names in either if (file := next(filter(self._is_file, names), None))]

    def _require_the_same_found_at_the_root(self) -> None:
        """Refuse what is beside a reference where the root has a module of that name, which would be found first."""
        at_root = {file.partition("/")[0].removesuffix(".py") for file in self.sources}
        for top, (where, file) in self._found_beside.items():
            if top in at_root:
                raise ProjectError(
                    f"{where}: {top} means both {file} and what is imported as {top} from {self._root}; import "
                    "it by its path from there"
                )


def _imports(tree: ast.Module) -> Iterator[_Import]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (_Import(node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = tuple(alias.name for alias in node.names)
            yield _Import(node.lineno, node.module or "", names, node.level)
