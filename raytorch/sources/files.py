"""The files of a source, below a root that is a folder or a store."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from posixpath import normpath
from typing import Any, BinaryIO, NamedTuple
from urllib.request import url2pathname
from weakref import finalize

from raytorch.config.sources import Source
from raytorch.errors import DataError
from raytorch.sources.stores import Store, close_files

_LEADS_NOWHERE = -1
"""In place of a link's size."""
_RANGE = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}")
_MOST_NUMBERED = 100_000


class AbsentFilesError(DataError):
    """A name that no file is of."""


class File(NamedTuple):
    """A file of a source."""

    name: str
    """Below the root, with ``/``."""
    size: int
    """Bytes."""


class Root:
    """Where the files of a source are. It goes to other processes as what names it, without connections.

    Example:
        >>> root = Root("data")
        >>> [file.name for file in root.find(["train/*.npy"])]
        ['train/x.npy', 'train/y.npy']
    """

    def __init__(self, root: str, cache_folder: str | None = None, cache_size: int | None = None) -> None:
        """A folder, or the URI of a store, whose whole files come through a cache on this node's disk.

        Its folder and size in bytes are as in :class:`~raytorch.sources.node_cache.NodeCache`.
        """
        self._arguments = root, cache_folder, cache_size
        is_folder = "://" not in root or root.startswith("file://")
        self._files = _Folder(root) if is_folder else Store(root, cache_folder, cache_size)
        self._kept: dict[str, BinaryIO] = {}
        finalize(self, close_files, self._kept)

    @classmethod
    def of(cls, section: Source) -> "Root":
        """The root that a source's section names, with the cache that it names."""
        return cls(section.root, section.cache_folder, section.cache_bytes)

    def __str__(self) -> str:
        return self._files.place("").rstrip("/")

    def __reduce__(self) -> tuple[Any, ...]:
        return Root, self._arguments

    @property
    def in_full(self) -> str:
        """The root as it is named from any folder."""
        return str(self._files.path("").absolute()) if isinstance(self._files, _Folder) else str(self)

    def find(self, names: Sequence[str], suffixes: Sequence[str] = ()) -> list[File]:
        """The files that are named, those of folders at any depth, in the order of the names and then of their own.

        Hidden ones are left out. ``{000..003}`` in a name stands for each of these numbers. Of folders and patterns
        with ``*`` those with one of the ``suffixes`` alone, where there are some. Raises AbsentFilesError for a name
        that none is of, and DataError for what cannot be read.
        """
        found = [file for name in names for each in _numbered(name) for file in self._named(each, tuple(suffixes))]
        return list(dict.fromkeys(found))

    def local(self, name: str) -> Path:
        """A file as one of this machine. One of a store is in the node's cache until it is released.

        Raises DataError if it is not in the store, and StorageError if that fails or the cache has no room for it.
        """
        if isinstance(self._files, _Folder):
            return self._files.path(name)
        if name not in self._kept:
            self._kept[name] = self.opened(name)
        return Path(self._kept[name].name)

    def release(self, name: str) -> None:
        """Let the cache remove a file for others, which :meth:`local` has brought there."""
        if file := self._kept.pop(name, None):
            file.close()

    def opened(self, name: str) -> BinaryIO:
        """A file of this machine, open. One of a store is in the node's cache while it, or a mapping of it, is open.

        Raises as :meth:`local`, and DataError if it cannot be opened.
        """
        with self._telling(name):
            return self._files.opened(name)

    def read(self, name: str, start: int = 0, size: int | None = None, *, whole: bool = False) -> bytes:
        """Bytes of a file. Raises DataError if it has fewer, and StorageError.

        Of one in a store these alone are fetched, unless the ``whole`` file is to be brought to the node's cache for
        the sake of others that are read after them, which is done as far as there is room.
        """
        with self._telling(name):
            content = self._files.read(name, start, size, whole=whole)
        if size is not None and len(content) < size:
            raise DataError(
                f"{self.place(name)}: cut short: expected {size:,} bytes from byte {start:,} on, found {len(content):,}"
            )
        return content

    def stamp(self, name: str) -> str:
        """What is another when the file has changed. Raises DataError if it is not there, and StorageError."""
        with self._telling(name):
            return self._files.stamp(name)

    def place(self, name: str) -> str:
        """A file as messages name it."""
        return self._files.place(name)

    @contextmanager
    def _telling(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise DataError(f"{self.place(name)}: cannot be read: there is no such file") from error
        except OSError as error:
            raise DataError(f"{self.place(name)}: cannot be read: {error.strerror or error}") from error

    def _named(self, name: str, suffixes: tuple[str, ...]) -> list[File]:
        below, pattern = (_fixed_part(name), name) if "*" in name else (_whole_path(name), None)
        if pattern is None and (size := self._files.size(below)) is not None:
            return [File(below, size)]
        files = sorted((File(*found) for found in self._files.below(below)), key=_order)
        chosen = [file for file in files if pattern is None or fnmatchcase(file.name, pattern)]
        chosen = [file for file in chosen if not suffixes or file.name.lower().endswith(suffixes)]
        if not chosen:
            what = f" {' or '.join(suffixes)}" if suffixes else ""
            found = f"none among the {len(files):,} files there" if files else self._files.absence(below)
            raise AbsentFilesError(f"{self.place(name)}: expected{what} files of the data set, found {found}")
        for file in chosen:
            if file.size == _LEADS_NOWHERE:
                raise DataError(f"{self.place(file.name)}: cannot be read: it is a link to what is not there")
        return chosen


class _Folder:
    """The files below a folder, as those below an address: see :class:`~raytorch.sources.stores.Store`."""

    def __init__(self, root: str) -> None:
        self._root = url2pathname(root.removeprefix("file://")) if "://" in root else root

    def path(self, name: str) -> Path:
        return Path(self._root).expanduser() / name

    def place(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def size(self, name: str) -> int | None:
        path = self.path(name)
        return path.stat().st_size if path.is_file() else None

    def below(self, folder: str) -> list[tuple[str, int]]:
        found: list[tuple[str, int]] = []
        left: list[tuple[str, tuple[os.stat_result, ...]]] = [(folder, ())] if self.path(folder).is_dir() else []
        while left:
            where, above = left.pop()
            try:
                itself = self.path(where).stat()
                if not any(os.path.samestat(itself, each) for each in above):  # as by a link to a folder that it is in
                    files, folders = self._in(where)
                    found += files
                    left += [(each, (*above, itself)) for each in folders]
            except OSError as error:
                raise DataError(f"{self.place(where)}: cannot be read: {error.strerror or error}") from error
        return found

    def _in(self, folder: str) -> tuple[list[tuple[str, int]], list[str]]:
        """Files and folders, by links too, but those that are hidden."""
        files, folders = [], []
        with os.scandir(self.path(folder)) as entries:
            for entry in entries:
                name = f"{folder}/{entry.name}" if folder else entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    folders.append(name)
                elif entry.is_file():
                    files.append((name, entry.stat().st_size))
                elif entry.is_symlink() and not self.path(name).exists():
                    files.append((name, _LEADS_NOWHERE))
        return files, folders

    def absence(self, folder: str) -> str:
        """What is there in place of files."""
        root = self.path("").absolute()
        if not os.path.exists(root):  # noqa: PTH110 (which raises for a folder that may not be looked into)
            missing = next(each for each in (*reversed(root.parents), root) if not os.path.exists(each))  # noqa: PTH110
            is_relative = not Path(self._root).expanduser().is_absolute()
            return (
                f"no folder {missing}"
                + (", as data.root is from the current folder" if is_relative else "")
                + ("; what begins with $ is not expanded, give the folder itself" if "$" in self._root else "")
            )
        return "none: that folder is empty" if self.path(folder).is_dir() else "no such file or folder"

    def read(self, name: str, start: int, size: int | None, *, whole: bool) -> bytes:
        with self.path(name).open("rb") as file:
            file.seek(start)
            return file.read(-1 if size is None else size)

    def stamp(self, name: str) -> str:
        return str(self.path(name).stat().st_mtime_ns)

    def opened(self, name: str) -> BinaryIO:
        return self.path(name).open("rb")


def _numbered(name: str) -> list[str]:
    """The names that ``{000..003}`` in one stands for, as in WebDataset's."""
    found = _RANGE.search(name)
    if found is None:
        return [name]
    first, last = found[1], found[2]
    if not 0 <= int(last) - int(first) < _MOST_NUMBERED:
        raise DataError(f"{name}: expected from 1 to {_MOST_NUMBERED:,} numbers in {found[0]}, the smallest first")
    begin, rest = name[: found.start()], _numbered(name[found.end() :])
    numbers = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return [f"{begin}{number}{end}" for number in numbers for end in rest]


def _order(file: File) -> list[tuple[bool, str]]:
    """The files of a folder come before those of the folders in it, whatever lists them."""
    *folders, name = file.name.split("/")
    return [*((True, folder) for folder in folders), (False, name)]


def _whole_path(name: str) -> str:
    path = normpath(name)
    return "" if path == "." else path


def _fixed_part(pattern: str) -> str:
    return pattern[: pattern.index("*")].rpartition("/")[0]
