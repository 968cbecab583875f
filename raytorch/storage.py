"""A run's folder in its storage: a local folder or any URI that pyarrow can open (s3://, gs://, hdfs://)."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from pyarrow import fs

from raytorch.errors import RunNotFoundError, UserError


def absolute(storage: str) -> str:
    """``storage`` with a relative or ``~`` path made absolute; a URI is returned as it is."""
    return storage if "://" in storage else str(Path(storage).expanduser().absolute())


def open_storage(storage: str) -> tuple[fs.FileSystem, str]:
    """The file system that holds ``storage`` and the path on it.

    Raises:
        UserError: The URI's scheme is unknown or its address cannot be used.
    """
    try:
        return fs.FileSystem.from_uri(absolute(storage))  # type: ignore[no-any-return]
    except (ValueError, OSError) as error:
        raise UserError(
            f"storage {storage!r} cannot be opened: {error}; give a folder or a URI such as s3://bucket/runs"
        ) from None


class RunFolder:
    """The folder of one run."""

    def __init__(self, storage: str, name: str) -> None:
        self.name = name
        self.filesystem, root = open_storage(storage)
        self.path = f"{root.rstrip('/')}/{name}"
        self.is_local = isinstance(self.filesystem, fs.LocalFileSystem)

    def __str__(self) -> str:
        return self.path

    def file(self, name: str) -> str:
        """Path of ``name`` in this folder, on :attr:`filesystem`."""
        return f"{self.path}/{name}"

    def exists(self, name: str = "") -> bool:
        """Whether the folder, or the file ``name`` in it, exists."""
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
        self.filesystem.create_dir(self.path)
        target = self.file(name)
        partial = f"{target}.partial" if self.is_local else target
        with self.filesystem.open_output_stream(partial) as stream:
            stream.write(text.encode())
        if self.is_local:
            self.filesystem.move(partial, target)

    def read_json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file; see :meth:`read_text`."""
        content: dict[str, Any] = json.loads(self.read_text(name))
        return content

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write an object as JSON; see :meth:`write_text`."""
        self.write_text(name, json.dumps(content, indent=2) + "\n")

    def delete(self, name: str) -> None:
        """Delete a file or folder, if it is there."""
        kind = self.filesystem.get_file_info(self.file(name)).type
        if kind == fs.FileType.Directory:
            self.filesystem.delete_dir(self.file(name))
        elif kind == fs.FileType.File:
            self.filesystem.delete_file(self.file(name))


class LiveFiles:
    """A local folder for files that grow while a run goes on: the run's own folder, or a copy that is sent there.

    Object stores cannot append, so for them :meth:`sync` uploads the files again.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self.path = Path(folder.path if folder.is_local else tempfile.mkdtemp(prefix="raytorch-"))
        if not folder.is_local:
            self._fetch()

    def sync(self) -> None:
        """Send what was written to the storage, where the storage is not local."""
        if not self._folder.is_local:
            fs.copy_files(str(self.path), self._folder.path, destination_filesystem=self._folder.filesystem)

    def close(self) -> None:
        """Sync for the last time and remove the local copy."""
        self.sync()
        if not self._folder.is_local:
            shutil.rmtree(self.path)

    def _fetch(self) -> None:
        """Go on with the records that an earlier attempt sent."""
        if self._folder.exists("metrics.jsonl"):
            (self.path / "metrics.jsonl").write_text(self._folder.read_text("metrics.jsonl"))
