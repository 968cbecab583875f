"""Files in a store: what pyarrow reaches (s3://, gs://, abfs://, hdfs://), and by other schemes what fsspec does."""

import hashlib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from weakref import finalize

from pyarrow import fs

from raytorch.errors import ConfigError, DataError, RaytorchError, StorageError, message_of
from raytorch.runs.remote_folder import LEAST_RATE, RemoteFolder, call_store
from raytorch.runs.storage import connect
from raytorch.sources.node_cache import NodeCache, NoRoomError
from raytorch.sources.retries import retrying
from raytorch.system.safe_text import without_secrets

T = TypeVar("T")

CHUNK = 8 * 2**20
"""Bytes of a whole file that are asked for at once."""
OPEN = 64
"""Files that are kept open: to open one is a request of its own."""
WHOLE = 4
"""Whole files that are kept open in the cache while parts of them are read, in each process."""
LISTING_S = 600.0
"""Longest wait for a listing, beside that for any answer."""
_CHANGES = 5
"""How often a file may change while it is fetched."""
_inherited: list[Any] = []
"""Connections of a process that this one was forked from. They are neither used nor taken apart."""


class Store:
    """The files below an address. It is connected to when it is first asked, once in each process.

    What is not there raises FileNotFoundError, and a store that fails StorageError, once it has been tried for minutes.
    """

    def __init__(self, address: str, cache_folder: str | None, cache_size: int | None) -> None:
        self._address, self._shown = address, without_secrets(address)
        self._cache_at = Path(cache_folder) if cache_folder else None, cache_size
        self._process: int | None = None
        self._connected: tuple[Any, str] | None = None
        self._open: dict[str, Any] = {}
        self._whole: dict[str, BinaryIO] = {}
        self._cache: NodeCache | None = None
        finalize(self, close_files, self._whole)

    def place(self, name: str) -> str:
        """A file as messages name it: without what the address says after ``?``."""
        return f"{self._shown.partition('?')[0].rstrip('/')}/{name}"

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if there is none."""
        size: int | None = self._ask(name, fs.FileSystem.get_file_info).size
        return size

    def below(self, folder: str) -> list[tuple[str, int]]:
        """The files in a folder, at any depth: name and size."""
        found = self._ask(folder, _listed, more=LISTING_S)
        if not found:
            self._ask("", self._require_bucket)
        return [(f"{folder}/{name}".lstrip("/"), size) for name, size in found]

    def absence(self, folder: str) -> str:
        """What is there in place of files: a store has no folders that are empty."""
        return "no such file or folder"

    def read(self, name: str, start: int, size: int | None, *, whole: bool = False) -> bytes:
        """Bytes of a file; fewer only if it has no more. The ``whole`` one comes to the cache, if that has room."""
        if whole and (file := self._whole_file(name)):
            return _bytes_of(file, start, size)
        return retrying(self.place(name), partial(self._range, name, start, size))

    def stamp(self, name: str) -> str:
        """What is another when the file has changed."""
        return self._version(name, self._ask(name, fs.FileSystem.open_input_file))

    def opened(self, name: str, wait_s: float | None = None) -> BinaryIO:
        """A file of this machine, in the node's cache for as long as it or a mapping of it is open."""
        if self._cache is None:
            self._cache = NodeCache(*self._cache_at)
        for _ in range(_CHANGES):
            source = self._ask(name, fs.FileSystem.open_input_file)
            size, version = source.size(), self._version(name, source)
            entry = json.dumps([self._shown, name, size, version])
            key = hashlib.sha256(entry.encode()).hexdigest()[:32]
            try:
                return self._cache.open(key, size, partial(self._fetch, name, size, version), self.place(name), wait_s)
            except _ChangedError:
                continue
        raise DataError(f"{self.place(name)}: it has changed {_CHANGES} times while it was fetched")

    def _whole_file(self, name: str) -> BinaryIO | None:
        """A file in the cache, one of the few that are kept open there; None if there is no room for it now."""
        self._forget_inherited()
        file = self._whole.pop(name, None)
        if file is None:
            while len(self._whole) >= WHOLE:
                self._whole.pop(next(iter(self._whole))).close()
            try:
                file = self.opened(name, wait_s=0)
            except NoRoomError:
                return None
        self._whole[name] = file
        return file

    def _fetch(self, name: str, size: int, version: str, file: BinaryIO) -> None:
        for start in range(0, size, CHUNK):
            wanted = min(CHUNK, size - start)
            content = self.read(name, start, wanted)
            if len(content) < wanted:
                raise _ChangedError
            file.write(content)
        if self.stamp(name) != version:
            raise _ChangedError

    def _range(self, name: str, start: int, size: int | None) -> bytes:
        """One try. A file that is to be read whole is opened anew, as it may be longer than it was."""
        file = None if size is None else self._open.pop(name, None)
        length = file.size() if file else 0
        if file is None or start + (size or 0) > length:
            file = self._call(name, fs.FileSystem.open_input_file)
            length = file.size()
        wanted = max(0, min(length - start, length if size is None else size))
        content: bytes = self._call(name, lambda *_: file.read_at(wanted, start), more=wanted / LEAST_RATE)
        if len(content) < wanted:
            raise StorageError(f"{len(content):,} bytes came in place of {wanted:,}")
        self._keep_open(name, file)
        return content

    def _keep_open(self, name: str, file: Any) -> None:
        self._open[name] = file
        for oldest in list(self._open)[:-OPEN]:
            self._open.pop(oldest, None)

    def _version(self, name: str, file: Any) -> str:
        """What the store says of a file's content, or without such a thing when it was changed last."""
        try:
            told = {key.lower(): value for key, value in (file.metadata() or {}).items()}
        except NotImplementedError:
            told = {}
        if tag := told.get("etag"):
            return bytes(tag).decode(errors="replace")
        return str(self._ask(name, _facts))

    def _ask(self, name: str, call: Callable[[Any, str], Any], more: float = 0.0) -> Any:
        """Call the store's client until it answers, with a file's path."""
        return retrying(self.place(name), partial(self._call, name, call, more))

    def _call(self, name: str, call: Callable[[Any, str], T], more: float = 0.0) -> T:
        filesystem, path = self._connection()
        try:
            return call_store(self._shown, call, filesystem, f"{path}/{name}".rstrip("/"), more=more)
        except (OSError, RaytorchError):
            raise
        except (ValueError, TypeError, NotImplementedError) as error:
            raise DataError(f"{self.place(name)}: cannot be read: {message_of(error)}") from error
        except Exception as error:  # of a client that fsspec has found, which may be anything
            raise OSError(f"{type(error).__name__}: {error}") from error

    def _require_bucket(self, filesystem: Any, path: str) -> None:
        if filesystem.type_name in ("s3", "gcs"):
            RemoteFolder(filesystem, path, self._shown).require_bucket()

    def _forget_inherited(self) -> None:
        if self._process != os.getpid():
            _inherited.append((self._connected, self._open, dict(self._whole)))
            self._connected, self._open = None, {}
            self._whole.clear()
            self._process = os.getpid()

    def _connection(self) -> tuple[Any, str]:
        self._forget_inherited()
        if self._connected is None:
            filesystem, path = _connect(self._address)
            self._connected = filesystem, path.rstrip("/")
        return self._connected


class _ChangedError(Exception):
    """A file is not what it was when its fetching began."""


def close_files(files: dict[str, BinaryIO]) -> None:
    """Close what was kept open."""
    for file in files.values():
        file.close()


def _listed(filesystem: Any, path: str) -> list[tuple[str, int]]:
    infos = filesystem.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
    files = [(info.path[len(path) :].lstrip("/"), info.size) for info in infos if info.type == fs.FileType.File]
    return [(name, size) for name, size in files if not any(part.startswith(".") for part in name.split("/"))]


def _facts(filesystem: Any, path: str) -> Any:
    """What is another when a file has changed."""
    if isinstance(filesystem, fs.PyFileSystem):
        return sorted((key, str(value)) for key, value in filesystem.handler.fs.info(path).items())
    return filesystem.get_file_info(path).mtime_ns


def _bytes_of(file: BinaryIO, start: int, size: int | None) -> bytes:
    """Bytes of a file, without its position, which processes that were forked share."""
    left = os.fstat(file.fileno()).st_size - start
    left = max(0, left if size is None else min(left, size))
    parts = []
    while left and (part := os.pread(file.fileno(), left, start)):
        parts.append(part)
        start, left = start + len(part), left - len(part)
    return b"".join(parts)


def _connect(address: str) -> tuple[Any, str]:
    shown = without_secrets(address)
    if "***" in address:
        raise ConfigError(
            f"data.root: {shown} is without its key, which no record keeps; give it again (--set data.root=...), or "
            "leave it to the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, say)"
        )
    try:
        return connect(address)
    except (ValueError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
    found = _by_fsspec(address) if "Unrecognized filesystem type" in reason else None
    if found is None:
        raise ConfigError(
            f"data.root: {shown} cannot be opened: {reason}; give a folder, or a URI such as s3://bucket/data"
        )
    return found


def _by_fsspec(address: str) -> tuple[Any, str] | None:
    """The file system of a scheme that pyarrow does not know; None where fsspec does not know it either."""
    try:
        from fsspec.core import url_to_fs
        from fsspec.registry import available_protocols
    except ImportError:
        return None
    if address.partition("://")[0] not in available_protocols():
        return None
    try:
        filesystem, path = call_store(without_secrets(address), url_to_fs, address)
    except ImportError as error:
        raise ConfigError(f"data.root: {without_secrets(address)}: {error}") from None
    return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), path
