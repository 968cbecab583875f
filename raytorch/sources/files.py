"""The files of a source, below a root that is a folder or a store."""

import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from raytorch.errors import DataError


class File(NamedTuple):
    """A file of a source."""

    name: str
    """Below the root, with ``/``."""
    size: int
    """Bytes."""


class Root:
    """Where the files of a source are.

    Example:
        >>> root = Root("data")
        >>> [file.name for file in root.find(["train/*.npy"])]
        ['train/x.npy', 'train/y.npy']
    """

    def __init__(self, root: str) -> None:
        self._root = root

    def __str__(self) -> str:
        return self._root

    def find(self, names: Sequence[str], suffixes: Sequence[str] = ()) -> list[File]:
        """The files that are named, those of folders at any depth, in the order of the names and then of their own.

        Of folders and patterns with ``*`` those with one of the ``suffixes`` alone, where there are some. Raises
        DataError for a name that none is of.
        """
        found = [file for name in names for file in self._named(name, tuple(suffixes))]
        return list(dict.fromkeys(found))

    def local(self, name: str) -> Path:
        """A file as one of this machine."""
        return Path(self._root).expanduser() / name

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        """Bytes of a file. Raises DataError if it has fewer."""
        try:
            with self.local(name).open("rb") as file:
                file.seek(start)
                content = file.read(-1 if size is None else size)
        except OSError as error:
            raise DataError(f"{self.place(name)}: cannot be read: {error.strerror or error}") from error
        if size is not None and len(content) < size:
            raise DataError(
                f"{self.place(name)}: cut short: expected {size:,} bytes from byte {start:,} on, found {len(content):,}"
            )
        return content

    def stamp(self, name: str) -> int:
        """When a file was changed last, in nanoseconds. Raises DataError if it is not there."""
        try:
            return self.local(name).stat().st_mtime_ns
        except OSError as error:
            raise DataError(f"{self.place(name)}: cannot be read: {error.strerror or error}") from error

    def place(self, name: str) -> str:
        """A file as messages name it."""
        return f"{self._root.rstrip('/')}/{name}"

    def _named(self, name: str, suffixes: tuple[str, ...]) -> list[File]:
        path = self.local(name)
        if path.is_file():
            return [File(name, path.stat().st_size)]
        below, pattern = (self._fixed_part(name), name) if "*" in name else (name, None)
        files = self._below(below) if self.local(below).is_dir() else []
        chosen = [file for file in files if pattern is None or fnmatchcase(file.name, pattern)]
        chosen = [file for file in chosen if not suffixes or file.name.lower().endswith(suffixes)]
        if not chosen:
            what = f" {' or '.join(suffixes)}" if suffixes else ""
            found = "no such file or folder" if not files else f"none among the {len(files):,} files there"
            raise DataError(f"{self.place(name)}: expected{what} files of the data set, found {found}")
        return chosen

    def _below(self, folder: str) -> list[File]:
        found = []
        for where, folders, names in os.walk(self.local(folder)):
            folders.sort()
            below = Path(where).relative_to(self.local("")).as_posix()
            paths = [name if below == "." else f"{below}/{name}" for name in sorted(names) if not name.startswith(".")]
            found += [File(path, self.local(path).stat().st_size) for path in paths]
        return found

    @staticmethod
    def _fixed_part(pattern: str) -> str:
        return pattern[: pattern.index("*")].rpartition("/")[0]
