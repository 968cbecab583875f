"""A run's folder in its storage: a local folder or any URI that pyarrow can open (s3://, gs://, hdfs://)."""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from pyarrow import fs

from raytorch.errors import RunExistsError, RunNotFoundError, UserError

LOCK_FILE = ".lock"
BASE = "RAYTORCH_STORAGE_BASE"
"""Environment variable that is set in a submitted job: the folder or URI that its relative storages are in."""


def in_job() -> bool:
    """Whether this process belongs to a submitted job, whose current folder ends with the cluster."""
    return bool(os.environ.get(BASE))


def absolute(path: str) -> str:
    """``path`` made absolute, with ``~`` expanded; a URI is returned as it is.

    Raises:
        UserError: ``~`` names a user that is not there.
    """
    if "://" in path:
        return path
    try:
        return str(Path(path).expanduser().absolute())
    except RuntimeError:
        raise UserError(f"{path}: there is no such user; give the folder in full") from None


def is_relative(path: str) -> bool:
    """Whether what a path means depends on the current folder."""
    return "://" not in path and not path.startswith(("/", "~"))


def locate(storage: str) -> str:
    """A storage's full address; a relative one is in what RAYTORCH_STORAGE_BASE names, else in the current folder.

    If its first part is also the base's last one, it counts once: in ``s3://b/runs``, ``runs`` is the base itself and
    ``runs/a`` its ``a``. A ``..`` stops at the base.

    Raises:
        UserError: A ``..`` would be in a URI; or as for :func:`absolute`.
    """
    if not in_job() or not is_relative(storage):
        return absolute(storage)
    base = os.environ[BASE]
    parts = _parts_below(base, storage)
    if parts[:1] == [split(base)[1]]:
        del parts[0]
    return absolute(join(base, "/".join(parts)) if parts else base)


def _parts_below(base: str, path: str) -> list[str]:
    if "://" in base and ".." in Path(path).parts:
        raise UserError(f"storage {path!r}: there is no '..' in {base}; give the storage in full, or without it")
    return [part for part in os.path.normpath(f"/{path}").split("/") if part]


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
    """The file system that holds ``storage`` and the path on it.

    Raises:
        UserError: The URI's scheme is unknown or its address cannot be used.
    """
    try:
        return fs.FileSystem.from_uri(locate(storage))  # type: ignore[no-any-return]
    except (ValueError, OSError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"storage {storage!r} cannot be opened: {reason}; give a folder or a URI such as s3://bucket/runs"
        ) from None


@contextmanager
def reaching(address: str) -> Iterator[None]:
    """Explain what goes wrong with a storage in the block.

    Raises:
        UserError: It cannot be reached, or may not be read or written.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{address} cannot be used: {error}; check the storage and your access to it") from error


class RunFolder:
    """The folder of one run."""

    def __init__(self, storage: str, name: str) -> None:
        self.storage = locate(storage)
        self.name = name
        self.filesystem, root = open_storage(storage)
        self.path = f"{root.rstrip('/')}/{name}"
        self.is_local = isinstance(self.filesystem, fs.LocalFileSystem)

    def __str__(self) -> str:
        """The folder as the command line takes it: a path, or a URI."""
        return self.path if self.is_local else join(self.storage, self.name)

    def file(self, name: str) -> str:
        """Path of ``name`` in this folder, on :attr:`filesystem`."""
        return f"{self.path}/{name}"

    def exists(self, name: str = "") -> bool:
        """Whether the folder, or the file ``name`` in it, exists."""
        with reaching(str(self)):
            return self.filesystem.get_file_info(self.file(name).rstrip("/")).type != fs.FileType.NotFound  # type: ignore[no-any-return]

    def folders(self) -> list[str]:
        """Names of the folders in this one, sorted."""
        entries = self.filesystem.get_file_info(fs.FileSelector(self.path, allow_not_found=True))
        return sorted(entry.base_name for entry in entries if entry.type == fs.FileType.Directory)

    def read_text(self, name: str) -> str:
        """The content of a file.

        Raises:
            RunNotFoundError: The file is not there.
        """
        try:
            with self.filesystem.open_input_stream(self.file(name)) as stream:
                return bytes(stream.read()).decode()
        except FileNotFoundError:
            raise RunNotFoundError(
                f"{self.file(name)} does not exist; 'raytorch runs' lists the runs of a storage"
            ) from None

    def write_text(self, name: str, text: str) -> None:
        """Write a file whole: a reader sees the old content or the new one, never a part."""
        self.write_bytes(name, text.encode())

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file whole; see :meth:`write_text`."""
        target = self.file(name)
        partial = f"{target}.partial" if self.is_local else target
        with reaching(str(self)):
            self.filesystem.create_dir(self.path)
            with self.filesystem.open_output_stream(partial) as stream:
                stream.write(content)
            if self.is_local:
                self.filesystem.move(partial, target)

    def read_json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file; see :meth:`read_text`."""
        content: dict[str, Any] = json.loads(self.read_text(name))
        return content

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write an object as JSON; see :meth:`write_text`."""
        self.write_text(name, json.dumps(content, indent=2) + "\n")

    def upload(self, local: Path, name: str = "") -> None:
        """Copy what a local folder holds into this folder, or into the folder ``name`` in it."""
        target = self.file(name).rstrip("/")
        self.filesystem.create_dir(target)
        fs.copy_files(str(local), target, destination_filesystem=self.filesystem)

    def fetch(self, name: str, local: Path) -> None:
        """Copy a file of this folder to a local path."""
        with reaching(str(self)):
            fs.copy_files(self.file(name), str(local), source_filesystem=self.filesystem)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Hold a local folder against other processes while the block runs.

        Object stores have no locks: there the caller has to see to it that nobody else writes.

        Raises:
            RunExistsError: Another process holds the folder.
        """
        self.filesystem.create_dir(self.path)
        if not self.is_local:
            yield
            return
        with Path(self.file(LOCK_FILE)).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunExistsError(f"{self} is being run by another process; wait for its end or stop it") from None
            yield

    def delete(self, name: str) -> None:
        """Delete a file or folder, if it is there."""
        kind = self.filesystem.get_file_info(self.file(name)).type
        if kind == fs.FileType.Directory:
            self.filesystem.delete_dir(self.file(name))
        elif kind == fs.FileType.File:
            self.filesystem.delete_file(self.file(name))


class LiveFiles:
    """A local folder for files that grow while a run goes on: the run's own folder, or one that is sent there.

    Object stores cannot append, so for them :meth:`sync` uploads the files again. Each worker has a folder of its own,
    with the files that it writes and no others. Used as a context manager it is closed however the block ends.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self.path = Path(folder.path if folder.is_local else tempfile.mkdtemp(prefix="raytorch-"))

    def extend(self, name: str) -> Path:
        """The local path of a file that this worker appends to, with what an earlier attempt sent of it."""
        path = self.path / name
        if not self._folder.is_local and self._folder.exists(name):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self._folder.read_text(name))
        return path

    def sync(self) -> None:
        """Send what was written to the storage, where the storage is not local."""
        if not self._folder.is_local:
            self._folder.upload(self.path)

    def close(self) -> None:
        """Sync for the last time and remove the local copy."""
        self.sync()
        if not self._folder.is_local:
            shutil.rmtree(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
