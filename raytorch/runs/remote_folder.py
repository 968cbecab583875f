"""A folder in a store that is reached over a network, through pyarrow: S3, Google Cloud Storage, Azure, HDFS.

The stores' clients wait for a store that does not answer as long as they please, some for a quarter of an hour, and
take no Ctrl-C meanwhile. So they are called in a thread, which is waited for as long as raytorch pleases.
"""

import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pyarrow import fs

from raytorch.errors import StorageError, UserError
from raytorch.system.regular_files import LONGEST_READ

T = TypeVar("T")

ANSWER_S = 15.0
"""Longest wait for an answer of a store; what is sent and fetched may take longer, within the client's own limits."""
LEAST_RATE = 1e6
"""Bytes per second at which a store that is there takes a file at least."""
CHUNK = 2**20

_under_way: set[threading.Event] = set()


def calls_under_way() -> bool:
    """Tell whether a call is still waited for by its thread alone; the client may let the process's end wait for it."""
    return bool(_under_way)


def call_store(address: str, call: Callable[..., T], *arguments: Any, more: float | None = 0.0) -> T:
    """Call a client of the store at ``address``. Ctrl-C ends the wait at once.

    Raises StorageError after :data:`ANSWER_S` and ``more`` seconds; with None, waits as long as the client does.
    """
    seconds = None if more is None else ANSWER_S + more
    answers: list[T] = []
    failures: list[BaseException] = []
    ended = threading.Event()  # to join the thread would mark it as ended when Ctrl-C comes (Python 3.11)

    def run() -> None:
        try:
            answers.append(call(*arguments))
        except BaseException as error:  # raised where the answer is waited for
            failures.append(error)
        _under_way.discard(ended)
        ended.set()

    _under_way.add(ended)
    threading.Thread(target=run, daemon=True, name="storage").start()
    ended.wait(seconds)
    if failures:
        raise failures[0]
    if not answers:
        raise StorageError(
            f"{address} did not answer within {seconds:.3g} s; is the address right, and the network there?"
        )
    return answers[0]


class RemoteFolder:
    """Reads and writes files by their names in a folder, as :class:`~raytorch.runs.local_folder.LocalFolder` does.

    Every method raises OSError as the store's client does, and StorageError if the store does not answer.
    """

    def __init__(self, filesystem: fs.FileSystem, path: str, address: str) -> None:
        self.path = path
        self._filesystem, self._address = filesystem, address

    def exists(self, name: str = "") -> bool:
        """Tell whether anything of that name is there."""
        return bool(self._info(name).type != fs.FileType.NotFound)

    def size(self, name: str) -> int | None:
        """Bytes of a file; None of what is not there, or is no file."""
        size: int | None = self._info(name).size
        return size

    def require_bucket(self) -> None:
        """Refuse a bucket that is not there. Raises UserError."""
        bucket = self.path.partition("/")[0]
        if not bucket:  # of a store without buckets
            return
        try:
            kind = self._ask(self._filesystem.get_file_info, bucket).type
        except OSError:  # who may not see the bucket itself may still use what is in it
            return
        if kind == fs.FileType.NotFound:
            raise UserError(f"{self._address}: there is no bucket {bucket}; correct the address, or make the bucket")

    def folders(self) -> list[str]:
        """Names of the folders in this one, sorted."""
        entries = self._ask(self._filesystem.get_file_info, fs.FileSelector(self.path, allow_not_found=True))
        return sorted(entry.base_name for entry in entries if entry.type == fs.FileType.Directory)

    def make(self, name: str = "") -> None:
        """Make a folder, where the store has such."""
        self._ask(self._filesystem.create_dir, self._place(name))

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """A file to read."""
        stream = self._ask(self._filesystem.open_input_stream, self._place(name))
        try:
            yield io.BufferedReader(_AnsweringStream(stream, self._ask), CHUNK)
        finally:
            self._ask(stream.close)

    @contextmanager
    def ranges(self, name: str) -> Iterator["RemoteFile"]:
        """A file that is read from anywhere."""
        file = self._ask(self._filesystem.open_input_file, self._place(name))
        try:
            yield RemoteFile(file, self._ask)
        finally:
            self._ask(file.close)

    def write(self, name: str, content: bytes) -> None:
        """Write a file whole; the store shows it when it is complete."""
        self.make()
        self._ask(self._write, name, content, more=len(content) / LEAST_RATE)

    def delete(self, name: str) -> None:
        """Delete a file or folder, if it is there."""
        kind = self._info(name).type
        if kind == fs.FileType.Directory:
            self._ask(self._filesystem.delete_dir, self._place(name), more=None)
        elif kind == fs.FileType.File:
            self._ask(self._filesystem.delete_file, self._place(name))

    def upload(self, local: Path, name: str = "") -> None:
        """Copy what a local folder holds into this folder, or into the folder ``name`` in it."""
        self.make(name)
        self._ask(self._upload, local, name, more=None)

    def _write(self, name: str, content: bytes) -> None:
        with self._filesystem.open_output_stream(self._place(name)) as stream:
            stream.write(content)

    def _upload(self, local: Path, name: str) -> None:
        fs.copy_files(str(local), self._place(name), destination_filesystem=self._filesystem)

    def _info(self, name: str) -> Any:
        return self._ask(self._filesystem.get_file_info, self._place(name))

    def _place(self, name: str) -> str:
        return f"{self.path}/{name}".rstrip("/")

    def _ask(self, call: Callable[..., T], *arguments: Any, more: float | None = 0.0) -> T:
        return call_store(self._address, call, *arguments, more=more)


class _AnsweringStream(io.RawIOBase):
    """A file of a store, each read of which has to be answered in time."""

    def __init__(self, stream: Any, ask_for: Callable[..., bytes]) -> None:
        super().__init__()
        self._stream, self._ask = stream, ask_for

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        read = self._ask(self._stream.read, len(buffer))
        buffer[: len(read)] = read
        return len(read)


class RemoteFile:
    """A file of a store that is read from anywhere, as :class:`~raytorch.system.regular_files.RegularFile` is; each
    read has to be answered in time.
    """

    def __init__(self, file: Any, ask_for: Callable[..., Any]) -> None:
        self._file, self._ask = file, ask_for
        self.size: int = ask_for(file.size)

    def read_into(self, place: int, memory: memoryview) -> None:
        """Fill ``memory`` with what begins at byte ``place``. Raises EOFError where the file has less."""
        while memory:
            count = min(len(memory), LONGEST_READ)
            read = self._ask(self._file.read_at, count, place, more=count / LEAST_RATE)
            if not read:
                raise EOFError(place)
            memory[: len(read)] = read
            memory, place = memory[len(read) :], place + len(read)
