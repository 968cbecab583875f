"""Whole files of stores on the node's disk, in one folder that the processes of the node share.

Nothing but the files in the folder says what is in it: the sum of their sizes is what is held, a download has its full
size from its first byte on, the time of a file is when it was last used, and who has it open holds a lock on it. So
nothing has to be put in order after a process was killed: its locks are gone with it.
"""

import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from raytorch.errors import StorageError
from raytorch.system.temporary_folders import users_folder

NAME = "data-cache"
"""The folder that is taken where none is named, in this user's temporary folder."""
SHARE = 0.5
"""Of what the disk has room for, what is held at most where no bound is given."""
ROOM_WAIT_S = 60.0
"""Longest wait for files to be closed that are open now, before a file that has no room is refused."""
_LOOK_S = 0.1
_PART = ".part"
_OURS = re.compile(rf"[0-9a-f]{{32}}(?:{re.escape(_PART)})?")


class NoRoomError(StorageError):
    """A file has no room in the cache."""


class _Held(NamedTuple):
    """A file of the cache."""

    used: int
    name: str
    size: int


class NodeCache:
    """Files by keys, 32 hexadecimal digits, of which the least recently used make room for others.

    A file stays for as long as it, or a mapping of it, is open in any process, so that the bound holds for the disk as
    well as for the folder.

    Example:
        >>> cache = NodeCache(Path("/data/cache"), 20 * 10**9)
        >>> file = cache.open("0" * 32, 5, lambda file: file.write(b"hello"), "s3://bucket/hello")
        >>> file.read()
        b'hello'
    """

    def __init__(self, folder: Path | None = None, bound: int | None = None) -> None:
        """``bound`` is in bytes; by default :data:`SHARE` of what the disk has room for. Raises StorageError."""
        self._bound = bound
        try:
            self.folder = _private(folder or users_folder() / NAME)
        except OSError as error:
            where = "data.cache_folder" if folder else "TMPDIR"
            raise StorageError(f"{folder or 'cache'}: {error.strerror or error}; set {where} to a folder") from error

    def open(
        self, key: str, size: int, fetch: Callable[[BinaryIO], object], place: str, wait_s: float | None = None
    ) -> BinaryIO:
        """The file of a key, to read; ``fetch`` writes its ``size`` bytes where it is not there.

        Of processes that come for the same file, one fetches it and the others wait. Raises what ``fetch`` does, and
        NoRoomError where there is none for the file, which messages call ``place``, :data:`ROOM_WAIT_S`, or ``wait_s``,
        after other downloads have ended; with 0 they are not waited for.
        """
        deadline: float | None = None
        while True:
            with self._locked():
                if found := self._used(key):
                    return found
                others = self._clear_leftovers()
                part = None if key + _PART in others else self._begun(key, size, place)
                awaited = self._awaited(key, others, wait_s) if part is None else None
            if part is not None:
                return self._fetched(key, part, size, fetch)
            if awaited is not None:
                _wait_for(awaited)
                continue
            deadline = deadline or time.monotonic() + (ROOM_WAIT_S if wait_s is None else wait_s)
            if time.monotonic() >= deadline:
                raise self._no_room(size, place)
            time.sleep(_LOOK_S)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone with the folder, among all processes and threads."""
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _used(self, key: str) -> BinaryIO | None:
        """A file that is there, open and held against removal: whatever maps it holds it too, as it shares the lock."""
        try:
            file = (self.folder / key).open("rb")
        except FileNotFoundError:
            return None
        fcntl.flock(file.fileno(), fcntl.LOCK_SH)  # nobody has another but for a moment, alone with the folder
        now = time.time_ns()
        os.utime(self.folder / key, ns=(now, now))  # finer than the clock of the file system
        return file

    def _held(self) -> list[_Held]:
        """The files of the cache, the least recently used first."""
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if _OURS.fullmatch(entry.name):
                    facts = entry.stat(follow_symlinks=False)
                    found.append(_Held(facts.st_mtime_ns, entry.name, facts.st_size))
        return sorted(found)

    def _clear_leftovers(self) -> list[str]:
        """Remove what downloads left that were killed; the names of those under way."""
        others = []
        for held in self._held():
            if held.name.endswith(_PART):
                if self._is_free(held.name):
                    (self.folder / held.name).unlink()
                else:
                    others.append(held.name)
        return others

    def _is_free(self, name: str) -> bool:
        """Tell whether nobody has a file open. It stays so for as long as one is alone with the folder."""
        descriptor = os.open(self.folder / name, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)
        return True

    def _begun(self, key: str, size: int, place: str) -> int | None:
        """The descriptor of a new download, held against others and of its full size; None if it has no room now."""
        if not self._make_room(size, place):
            return None
        descriptor = os.open(self.folder / (key + _PART), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.truncate(descriptor, size)
        return descriptor

    def _make_room(self, size: int, place: str) -> bool:
        """Remove the least recently used files that nobody has open, as far as needed, and none if that is no use."""
        held = self._held()
        total = sum(each.size for each in held)
        bound = self._bound_with(total)
        if size > bound:
            raise NoRoomError(
                f"{place}: its {size:,} bytes are more than the cache of this node ({self.folder}) may hold, "
                f"{bound:,}; raise data.cache_size, or set data.cache_folder to a folder on a larger disk"
            )
        removed = []
        for each in held:
            if total + size <= bound:
                break
            if not each.name.endswith(_PART) and self._is_free(each.name):
                removed.append(each.name)
                total -= each.size
        if total + size > bound:
            return False
        for name in removed:
            (self.folder / name).unlink()
        return True

    def _bound_with(self, held: int) -> int:
        if self._bound is not None:
            return self._bound
        disk = os.statvfs(self.folder)
        return int(SHARE * (disk.f_bavail * disk.f_frsize + held))

    def _awaited(self, key: str, others: list[str], wait_s: float | None) -> int | None:
        """A download to wait for: that of the key itself, or one that is in the way, if that may be waited for."""
        names = [key + _PART] if key + _PART in others else others if wait_s != 0 else []
        return os.open(self.folder / names[0], os.O_RDONLY) if names else None

    def _fetched(self, key: str, part: int, size: int, fetch: Callable[[BinaryIO], object]) -> BinaryIO:
        path = self.folder / (key + _PART)
        with os.fdopen(part, "r+b") as file:
            try:
                fetch(file)
                assert file.tell() == size
                file.flush()
                os.fsync(part)  # or a machine that fails would leave a file of the right size and nothing in it
            except BaseException as error:
                with self._locked():
                    path.unlink()
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise StorageError(f"{self.folder}: the disk is full; lower data.cache_size") from error
                raise
            with self._locked():
                path.rename(self.folder / key)
                file.close()  # and with it the lock, which readers would wait for
                found = self._used(key)
        assert found
        return found

    def _no_room(self, size: int, place: str) -> NoRoomError:
        with self._locked():
            bound = self._bound_with(sum(each.size for each in self._held()))
        return NoRoomError(
            f"{place}: there is no room for its {size:,} bytes in the cache of this node ({self.folder}), which may "
            f"hold {bound:,}: other files in it are open; raise data.cache_size"
        )


def _wait_for(download: int) -> None:
    """Wait until a download has ended, by whatever end."""
    try:
        fcntl.flock(download, fcntl.LOCK_SH)
    finally:
        os.close(download)


def _private(folder: Path) -> Path:
    """Make a folder for this user alone, unless it is there. Raises PermissionError if it is another's."""
    folder = folder.expanduser()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.stat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & stat.S_IWOTH:
        raise PermissionError(f"{folder} is no folder that this user alone may write to")
    return folder
