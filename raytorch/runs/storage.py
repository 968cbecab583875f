"""A run's folder in its storage: a local folder or any URI that pyarrow can open (s3://, gs://, hdfs://)."""

import logging
import os
import posixpath
import shutil
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from io import BufferedWriter
from pathlib import Path
from typing import Any, BinaryIO

from pyarrow import fs

from raytorch.errors import RecordError, Remedy, RunNotFoundError, StorageError, UserError
from raytorch.runs.local_folder import LocalFolder
from raytorch.runs.remote_folder import ANSWER_S, RemoteFile, RemoteFolder, call_store
from raytorch.system.regular_files import RegularFile
from raytorch.system.safe_text import escaped, without_secrets
from raytorch.system.strict_json import to_json
from raytorch.system.temporary_folders import make_temporary, temporary_folder

LARGEST_RECORD = 8 * 2**20
"""Bytes of a record at most, which is read as a whole."""
BASE = "RAYTORCH_STORAGE_BASE"
"""Environment variable that is set in a submitted job: the folder or URI that its relative storages are in."""

logger = logging.getLogger("raytorch")


def is_in_job() -> bool:
    """Tell whether this process belongs to a submitted job, whose current folder ends with the cluster."""
    return bool(os.environ.get(BASE))


def absolute(path: str) -> str:
    """``path`` made absolute, with ``~`` expanded; a URI as it is. Raises UserError for what can be no path."""
    if "://" in path:
        return path
    _require_encodable(path)
    try:
        return str(Path(path).expanduser().absolute())
    except RuntimeError:
        raise UserError(f"{path}: there is no such user; give the folder in full") from None


def from_here(path: str) -> str:
    """``path`` as it is shortest named in a command: a folder below the current one without what leads there."""
    try:
        shorter = str(Path(path).relative_to(Path.cwd()))
    except (ValueError, OSError):  # it is elsewhere, or the current folder is gone
        return path
    if is_in_job():  # whose current folder is not the reader's
        return path
    return shorter if is_relative(shorter) and not shorter.startswith("-") else path


def _require_encodable(path: str) -> None:
    try:
        if b"\0" not in os.fsencode(path):
            return
    except UnicodeEncodeError:
        pass
    raise UserError(f"{path!a} cannot be a path: it holds what no file's name can")


def is_relative(path: str) -> bool:
    """Tell whether what a path means depends on the current folder."""
    return "://" not in path and not path.startswith(("/", "~"))


def locate(storage: str) -> str:
    """A storage's full address; a relative one is in what RAYTORCH_STORAGE_BASE names, else in the current folder.

    If its first part is also the base's last one, it counts once: in ``s3://b/runs``, ``runs`` is the base itself and
    ``runs/a`` its ``a``. A ``..`` stops at the base; in a URI it raises UserError.
    """
    if not is_in_job() or not is_relative(storage):
        return absolute(storage)
    base = os.environ[BASE]
    if "://" in base and ".." in Path(storage).parts:
        raise UserError(f"storage {storage!r}: there is no '..' in {base}; give the storage in full, or without it")
    parts = [part for part in os.path.normpath(f"/{storage}").split("/") if part]
    if parts[:1] == [split(base)[1]]:
        del parts[0]
    return absolute(join(base, "/".join(parts)) if parts else base)


def join(storage: str, name: str) -> str:
    """The address of ``name`` in a storage; what a URI says after ``?`` stays behind it."""
    base, mark, options = storage.partition("?") if "://" in storage else (storage, "", "")
    return f"{base.rstrip('/')}/{name}{mark}{options}"


def split(address: str) -> tuple[str, str]:
    """A storage and the name in it, the reverse of :func:`join`."""
    base, mark, options = address.partition("?") if "://" in address else (address, "", "")
    storage, _, name = base.rstrip("/").rpartition("/")
    return f"{storage or '/'}{mark}{options}", name


def open_storage(storage: str) -> tuple[fs.FileSystem, str]:
    """The file system that holds ``storage`` and the path on it. Raises UserError where nothing can be opened."""
    address = locate(storage)
    if "://" not in address:
        return fs.LocalFileSystem(), address.rstrip("/") or "/"
    try:
        filesystem, path = connect(address)
    except (ValueError, OSError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"storage {storage!r} cannot be opened: {reason}; give a folder or a URI such as s3://bucket/runs"
        ) from None
    return filesystem, path


def connect(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system of a URI and the path on it.

    Raises ValueError, OSError and NotImplementedError as its client does, and StorageError if it does not answer.
    """
    filesystem, path = call_store(uri, fs.FileSystem.from_uri, _with_bounds(uri))
    return filesystem, path


def _with_bounds(uri: str) -> str:
    """``uri`` with a bound on the retries of Google's client, which goes on for a quarter of an hour by itself."""
    if not uri.startswith(("gs://", "gcs://")) or "retry_limit_seconds=" in uri:
        return uri
    return f"{uri}{'&' if '?' in uri else '?'}retry_limit_seconds={ANSWER_S:g}"


def run_folders(storage: str) -> Iterator["RunFolder"]:
    """The folders in a storage, which may be runs, sorted by their names. Raises UserError.

    Links are left out; one that leads elsewhere is warned of.
    """
    filesystem, root = open_storage(storage)
    with translating_storage_errors(storage):
        if isinstance(filesystem, fs.LocalFileSystem):
            names = _folders_in(root)
        else:
            names = (store := RemoteFolder(filesystem, root, storage)).folders()
            if not names:
                store.require_bucket()
    return (RunFolder(storage, name) for name in names)


def _folders_in(root: str) -> list[str]:
    try:
        with os.scandir(root) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except FileNotFoundError:
        return []
    for entry in found:
        if entry.is_symlink() and _leads_elsewhere(entry, root):
            logger.warning(
                "%s is a link, which is not followed: its runs are listed where it leads", escaped(entry.path)
            )
    return [entry.name for entry in found if entry.is_dir(follow_symlinks=False)]


def _leads_elsewhere(link: os.DirEntry[str], root: str) -> bool:
    """Tell whether a link leads to a folder that is not in ``root`` itself, as far as it can be followed."""
    try:
        return link.is_dir() and Path(link).resolve().parent != Path(root).resolve()
    except (OSError, RuntimeError):  # in a circle, or to where this user may not look
        return False


@contextmanager
def translating_storage_errors(address: str) -> Iterator[None]:
    """Explain, by a StorageError, what goes wrong with a storage in the block; what is not there is left as it is."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(f"{address} cannot be used: {error}; check the storage and your access to it") from error


class RunFolder:
    """The folder of one run.

    Making one, and every method, raises UserError where the storage cannot be opened or reached, does not answer, may
    not be read or written, or where a link is in the way.
    """

    def __init__(self, storage: str, name: str) -> None:
        _require_encodable(name)
        self.storage = locate(storage)
        self.name = name
        self.filesystem, root = open_storage(storage)
        self.path = f"{root.rstrip('/')}/{name}"
        self.is_local = isinstance(self.filesystem, fs.LocalFileSystem)
        self._files = LocalFolder(self.path) if self.is_local else RemoteFolder(self.filesystem, self.path, str(self))

    def __str__(self) -> str:
        """The folder for people: :attr:`address` without the secrets that it may hold."""
        return without_secrets(self.address)

    @property
    def address(self) -> str:
        """The folder as the command line takes it: a path, or a URI."""
        return self.path if self.is_local else join(self.storage, self.name)

    def file(self, name: str) -> str:
        """Path of ``name`` in this folder, on :attr:`filesystem`. Raises UserError where it would lead out of it."""
        if any(part in ("", ".", "..") for part in name.split("/")):
            raise UserError(
                f"{name!r} names nothing in {self}: a name in a run's folder has no '..' and no '/' before it"
            )
        return f"{self.path}/{name}"

    def exists(self, name: str = "") -> bool:
        """Tell whether the folder, or the file ``name`` in it, exists."""
        with self._translating_errors(name):
            return self._files.exists(name)

    def size(self, name: str) -> int | None:
        """Bytes of a file; None of what is not there, or is no file."""
        with self._translating_errors(name):
            return self._files.size(name)

    def folders(self) -> list[str]:
        """Names of the folders in this one, sorted."""
        with self._translating_errors():
            return self._files.folders()

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """A file to read. Raises RunNotFoundError if it is not there, and RecordError if it is no file."""
        with self._translating_errors(name):
            try:
                file = self._files.open(name)
                with file as stream:
                    yield stream
            except FileNotFoundError:
                raise self._missing(name) from None

    @contextmanager
    def ranges(self, name: str) -> Iterator[RegularFile | RemoteFile]:
        """A file that is read from anywhere. Raises as :meth:`open` does."""
        with self._translating_errors(name):
            try:
                with self._files.ranges(name) as file:
                    yield file
            except FileNotFoundError:
                raise self._missing(name) from None

    def read_bytes(self, name: str) -> bytes:
        """The content of a file of at most :data:`LARGEST_RECORD` bytes, or RecordError; see :meth:`open`."""
        with self.open(name) as stream:
            content = stream.read(LARGEST_RECORD + 1)
        if len(content) > LARGEST_RECORD:
            raise RecordError(
                f"{self.file(name)} has more than {LARGEST_RECORD:,} bytes; none that raytorch writes has"
            )
        return content

    def write_text(self, name: str, text: str) -> None:
        """Write a file whole: a reader sees the old content or the new one, never a part.

        The key and secret of an address are left out: who may read the folder need not have them.
        """
        self.write_bytes(name, without_secrets(text).encode(errors="backslashreplace"))

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file whole; see :meth:`write_text`."""
        with self._translating_errors(name):
            self._files.write(name, content)

    def write_over(self, name: str, contents: Iterable[bytes]) -> bool:
        """Write over a local file in place, with the first content for which it has room; answers whether one had.

        For a disk that is full, where :meth:`write_bytes` has no room for a new file.
        """
        with self._translating_errors(name):
            return isinstance(self._files, LocalFolder) and self._files.write_over(name, contents)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write an object as JSON; see :meth:`write_text`."""
        self.write_text(name, to_json(content, indent=2) + "\n")

    def upload(self, local: Path, name: str = "") -> None:
        """Copy what a local folder holds into this folder, which is not local, or into the folder ``name`` in it."""
        assert isinstance(self._files, RemoteFolder)
        with self._translating_errors(name):
            self._files.upload(local, name)

    def fetch(self, name: str, local: Path) -> None:
        """Copy a file of this folder to a new local one."""
        with self.open(name) as source, local.open("xb") as target:
            shutil.copyfileobj(source, target)

    @contextmanager
    def local_copy(self, name: str, files: Iterable[str]) -> Iterator[Path]:
        """The folder ``name`` in this one; if that is not local, a copy with those of its ``files`` that are there."""
        if self.is_local:
            yield Path(self.file(name))
            return
        with temporary_folder() as copy:
            for file in files:
                with suppress(RunNotFoundError):  # which is told by who reads it
                    self.fetch(f"{name}/{file}", copy / file)
            yield copy

    def make(self, name: str = "") -> str:
        """Make this folder and those above it, or the folder ``name`` in this one; answers its path."""
        with self._translating_errors(name):
            self._files.make(name)
        return f"{self.path}/{name}".rstrip("/")

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Make the folder, and hold a local one against other processes while the block runs; RunExistsError if another
        one holds it.

        Object stores have no locks: there the caller has to see to it that nobody else writes.
        """
        with ExitStack() as held:
            with self._translating_errors():
                if isinstance(self._files, RemoteFolder):
                    self._files.require_bucket()
                self._files.make()
                if isinstance(self._files, LocalFolder):
                    held.enter_context(self._files.locked())
            yield

    def delete(self, name: str) -> None:
        """Delete a file or folder, if it is there."""
        with self._translating_errors(name):
            self._files.delete(name)

    def _missing(self, name: str) -> RunNotFoundError:
        return RunNotFoundError(
            f"{self.file(name)} does not exist; give a run that is there",
            remedies=[Remedy("list_runs", without_secrets(self.storage))],
        )

    def _translating_errors(self, name: str = "") -> AbstractContextManager[None]:
        if name:
            self.file(name)
        return translating_storage_errors(str(self))


class LiveFiles:
    """A local folder for files that grow while a run goes on: the run's own folder, or one that is sent there.

    Object stores cannot append, so for them :meth:`sync` uploads the files again. Each worker has a folder of its own,
    with the files that it writes and no others.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self.path = Path(folder.path) if folder.is_local else make_temporary()
        self._files = LocalFolder(str(self.path))

    def extend(self, name: str) -> BufferedWriter:
        """A file that this worker appends to, with what an earlier attempt sent of it."""
        if not self._folder.is_local and not self._files.exists(name) and self._folder.exists(name):
            self._files.make(posixpath.dirname(name))
            self._folder.fetch(name, self.path / name)
        with translating_storage_errors(str(self._folder)):
            return self._files.append(name)

    def make(self, name: str) -> Path:
        """The local path of a folder in this one, made unless it is there."""
        with translating_storage_errors(str(self._folder)):
            return self._files.make(name)

    def sync(self) -> None:
        """Send what was written to the storage, where the storage is not local."""
        if not self._folder.is_local:
            self._folder.upload(self.path)

    def close(self) -> None:
        """Sync for the last time and remove the local copy."""
        try:
            self.sync()
        finally:
            if not self._folder.is_local:
                shutil.rmtree(self.path)
