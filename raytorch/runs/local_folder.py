"""A folder on a local disk that others may have written to: no link in it is followed.

Links are refused where they are: in the name of the folder itself, and in that of anything in it. What leads to the
folder, the storage, may be one. New files have random names and are created, never opened, until they are complete.
"""

import errno
import fcntl
import os
import posixpath
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedRandom, BufferedReader, BufferedWriter
from pathlib import Path
from secrets import token_hex
from typing import Any

from raytorch.errors import RecordError, RunExistsError, StorageError, UserError
from raytorch.system.deletion import delete_tree
from raytorch.system.regular_files import RegularFile, open_regular

LOCK_FILE = ".lock"
CHUNK = 2**20
BLOCK = 512
"""Bytes in which a file's room on the disk is counted, whatever its blocks are."""
_PARTIAL = re.compile(r"\..+\.[0-9a-f]{16}\.partial")
_READ = os.O_RDONLY | os.O_NOFOLLOW
_FOLDER = os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY
_CHANGED = os.O_RDWR | os.O_NOFOLLOW
_NEW = os.O_WRONLY | os.O_NOFOLLOW | os.O_CREAT | os.O_EXCL
_GROWING = _CHANGED | os.O_CREAT
_NO_FILE = (errno.ENXIO, errno.EISDIR)
"""Why what is no file, and folders that are to be written, cannot be opened."""


class LocalFolder:
    """Reads and writes files by their names in a folder, such as ``logs/rank-0.log``.

    Every method raises OSError as the system does, and UserError where a link is in the way; those that open a file
    raise RecordError for what is none, and those that write StorageError where the folder itself is not there: it is
    made by :meth:`make` alone.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def exists(self, name: str = "") -> bool:
        """Tell whether anything of that name is there, a link included."""
        return self._status(name) is not None

    def size(self, name: str) -> int | None:
        """Bytes of a file; None of what is not there, or is no file."""
        found = self._status(name)
        return found.st_size if found and stat.S_ISREG(found.st_mode) else None

    def folders(self) -> list[str]:
        """Names of the folders in this one, sorted."""
        try:
            with self._opened() as at, os.scandir(at) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
        except FileNotFoundError:
            return []

    def make(self, name: str = "") -> Path:
        """Make this folder and those above it, or the folder ``name`` in this one, unless it is there."""
        if not name:
            with suppress(FileExistsError):  # which is looked at below
                Path(self.path).mkdir(parents=True)
        with self._opened(name, create=True):
            return Path(self.path, name)

    def open(self, name: str) -> BufferedReader:
        """A file to read."""
        with self._opened(posixpath.dirname(name)) as at:
            file: BufferedReader = self._file(at, name, _READ, "rb")
            return file

    @contextmanager
    def ranges(self, name: str) -> Iterator[RegularFile]:
        """A file that is read from anywhere."""
        with self.open(name) as file:
            yield RegularFile(file.fileno())

    def write(self, name: str, content: bytes | Iterable[bytes]) -> None:
        """Write a file whole: a reader sees the old content or the new one, never a part; it may be made of pieces."""
        above, last = posixpath.split(name)
        with self._opened(above, create=True) as at:
            self._replace(at, last, content)

    def write_over(self, name: str, contents: Iterable[bytes]) -> bool:
        """Write the first content that fits into the blocks of a file that is there, which a full disk takes as well.

        Answers whether one did. A reader may see a part of it for a moment.
        """
        with self._opened(posixpath.dirname(name)) as at:
            file: BufferedRandom = self._file(at, name, _CHANGED, "r+b")
        with file:
            descriptor = file.fileno()
            there = os.fstat(descriptor)
            room = max(there.st_size, there.st_blocks * BLOCK) if there.st_nlink == 1 else 0
            content = next((content for content in contents if len(content) <= room), None)
            if content is None:
                return False
            whole = content.ljust(there.st_size)  # nothing of the old content is left behind it at any time
            written = os.pwrite(descriptor, whole, 0)
            os.truncate(descriptor, len(content))
            return written == len(whole)

    def append(self, name: str) -> BufferedWriter:
        """A file to write at the end of, there from now on."""
        above, last = posixpath.split(name)
        with self._opened(above, create=True) as at:
            file: BufferedWriter = self._file(at, name, _GROWING | os.O_APPEND, "ab")
            if os.fstat(file.fileno()).st_nlink > 1:  # a link as well: the file has another name elsewhere
                with file, self.open(name) as before:
                    self._replace(at, last, iter(lambda: before.read(CHUNK), b""))
                return self.append(name)
            return file

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder against other processes while the block runs; RunExistsError if another one holds it."""
        with self._opened() as at:
            lock = self._file(at, LOCK_FILE, _GROWING, "r+b")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunExistsError(
                    f"{self.path} is being run by another process; wait for its end or stop it"
                ) from None
            self._delete_partial_files()
            yield

    def delete(self, name: str) -> None:
        """Delete a file, link or folder, however deep, if it is there; what a link leads to stays."""
        above, last = posixpath.split(name)
        with suppress(FileNotFoundError), self._opened(above) as at:
            if stat.S_ISDIR(os.stat(last, dir_fd=at, follow_symlinks=False).st_mode):
                delete_tree(last, at)
            else:
                os.unlink(last, dir_fd=at)

    def _status(self, name: str) -> os.stat_result | None:
        above, last = posixpath.split(name)
        try:
            if not name:
                return os.lstat(self.path)
            with self._opened(above) as at:
                return os.stat(last, dir_fd=at, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return None

    @contextmanager
    def _opened(self, name: str = "", *, create: bool = False) -> Iterator[int]:
        """A descriptor of this folder, or of the folder ``name`` in it, which with ``create`` is made."""
        try:
            with self._explaining(""):
                at = os.open(self.path, _FOLDER)
        except FileNotFoundError:
            if not create:
                raise
            raise StorageError(
                f"{self.path} is gone: it was deleted, or its storage is not mounted here; mend that before you go on"
            ) from None
        try:
            for part in name.split("/") if name else []:
                with self._explaining(name):
                    inner = _enter(part, at, create)
                os.close(at)
                at = inner
            yield at
        finally:
            os.close(at)

    @contextmanager
    def _explaining(self, name: str) -> Iterator[None]:
        """Tell what is a link, or no file, from other reasons why ``name`` cannot be opened."""
        try:
            yield
        except OSError as error:
            below = Path(name)
            paths = [Path(self.path, part) for part in reversed((below, *below.parents))]
            link = next((path for path in paths if path.is_symlink()), None)
            if link:
                raise UserError(f"{link} is a link, which is not followed; put in its place what it leads to") from None
            if error.errno in _NO_FILE:
                raise RecordError(
                    f"{self.path}/{name} is not a file, but a folder, a pipe or a device; move it away"
                ) from None
            raise

    def _file(self, at: int, name: str, flags: int, mode: str) -> Any:
        """A regular file of this folder, which is in the folder ``at``, open."""
        with self._explaining(name):
            return os.fdopen(open_regular(posixpath.basename(name), flags, at), mode)

    def _replace(self, at: int, name: str, content: bytes | Iterable[bytes]) -> None:
        partial = f".{name}.{token_hex(8)}.partial"
        descriptor = os.open(partial, _NEW, 0o666, dir_fd=at)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.writelines([content] if isinstance(content, bytes) else content)
            os.rename(partial, name, src_dir_fd=at, dst_dir_fd=at)
        except BaseException:
            with suppress(OSError):
                os.unlink(partial, dir_fd=at)
            raise

    def _delete_partial_files(self) -> None:
        """Delete what a process left that was killed while it wrote."""
        with self._opened() as at, os.scandir(at) as entries:
            for name in [entry.name for entry in entries if _PARTIAL.fullmatch(entry.name)]:
                self.delete(name)


def _enter(folder: str, at: int, create: bool) -> int:
    if create:
        with suppress(FileExistsError):
            os.mkdir(folder, dir_fd=at)
    return os.open(folder, _FOLDER, dir_fd=at)
