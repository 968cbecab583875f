"""Writing checkpoints while the training goes on: what a worker has is copied, and a thread writes the copy.

Workers that write one together each leave a note beside their files when these are complete, for which rank 0 waits.
"""

import json
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError

from raytorch.errors import ModelFileError, RecordError, Remedy, RunNotFoundError, StorageError, UserError
from raytorch.runs.checkpoint_manifest import checkpoint_name
from raytorch.runs.storage import RunFolder
from raytorch.system.temporary_folders import make_temporary
from raytorch.training.checkpoint_files import Content, HostCopies, Models, Share, Written, content_of, write_files

STAGING = ".saving-"
"""What the name of a checkpoint's folder begins with, in local storage, until it is complete."""
ALONE = Share()
GRACE_S = 10.0
"""Longest wait for the parts of other workers when the run has failed."""
LOOK_S = {True: 0.02, False: 0.5}
"""Seconds between two looks for them in storage that is local, or is not."""


class CheckpointWriter:
    """Writes what this worker has of each checkpoint, in a thread of its own.

    Args:
        folder: The run's folder.
        share: Which of the workers that write this one is.
        background: Whether the training goes on meanwhile, for which what is written is copied first.
    """

    def __init__(self, folder: RunFolder, share: Share = ALONE, *, background: bool = True) -> None:
        self._folder, self._share, self._background = folder, share, background
        self._token, self._count = share.token or uuid4().hex, 0
        self._copies = HostCopies()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._notes = Notes(folder, share)
        self.saved = 0
        """How many checkpoints were begun."""
        self.blocked_s = self.written_s = 0.0
        """Seconds for which they kept this worker waiting, and in which they were written."""

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is still being written."""
        return self._writing is not None and not self._writing.done()

    def save(self, models: Models, state: dict[str, Any], manifest: dict[str, Any]) -> None:
        """Take what a checkpoint is to hold, which may change as soon as this returns, and begin to write it.

        One that is still being written is waited for first. Raises StorageError if that could not be written, TypeError
        for what is neither a tensor nor JSON, and ModelFileError for more than could be read again.

        Args:
            models: The bare models by name, not their DDP wrappers, each with what it was built from if that is known.
            state: Nested dictionaries and lists of tensors and of what JSON has.
            manifest: ``step``, ``metrics``, whether they are those of this very model (``evaluated``), and whatever
                else a reader should know; JSON types only.
        """
        began = time.perf_counter()
        self.wait()
        name = checkpoint_name(manifest["step"])
        content = content_of(models, state, self._share, Path(self._folder.file(name)))
        if self._background:
            content = self._copies.of(content)
        self.saved, self._count = self.saved + 1, self._count + 1
        save = sha256(f"{self._token} {self._count}".encode()).hexdigest()[:32]  # the same on all workers
        self._writing = self._thread.submit(self._write, content, save, manifest)
        if not self._background:
            self.wait()
        self.blocked_s += time.perf_counter() - began

    def look(self) -> None:
        """Raise StorageError if the newest checkpoint could not be written, as far as that is known."""
        if self._writing and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Return once what was saved is written. Raises StorageError if it cannot be."""
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def close(self) -> None:
        """End. What is still being written is waited for; what other workers write, for no longer than a moment."""
        self._notes.end_soon()
        with suppress(StorageError, UserError):  # the run has failed of something else, or has been told
            self.wait()
        self._thread.shutdown(wait=False)

    def _write(self, content: Content, save: str, manifest: dict[str, Any]) -> None:
        began = time.perf_counter()
        folder, staging = self._folder, f"{STAGING}{save}"
        staged = Path(folder.make(staging)) if folder.is_local else make_temporary()
        with self._telling_faults(staged, checkpoint_name(manifest["step"])):
            self._finish(staged, write_files(content, staged, save), manifest)
        self.written_s += time.perf_counter() - began

    def _finish(self, staged: Path, written: Written, manifest: dict[str, Any]) -> None:
        """Hand in what this worker has written, which rank 0 completes."""
        folder = self._folder
        name = staged.name if folder.is_local else checkpoint_name(manifest["step"])
        if not folder.is_local:
            folder.upload(staged, name)
            shutil.rmtree(staged)
        self._notes.leave(name, asdict(written))

    @contextmanager
    def _telling_faults(self, staged: Path, name: str) -> Iterator[None]:
        """Leave no half of a checkpoint behind where the storage fails in the block, as a full disk would stay full."""
        try:
            yield
        except (OSError, SafetensorError, StorageError, ModelFileError) as error:
            shutil.rmtree(staged, ignore_errors=True)
            if not self._folder.is_local:
                with suppress(UserError, OSError):
                    self._folder.delete(name)
            raise StorageError(
                f"{self._folder}: a checkpoint cannot be written: {error}; free space there, lower checkpoint.keep or "
                "save less often, and resume it",
                remedies=[Remedy("resume", str(self._folder))],
            ) from error


class Notes:
    """What workers tell rank 0 by files beside those that they have written of a checkpoint."""

    def __init__(self, folder: RunFolder, share: Share) -> None:
        self._folder, self._share = folder, share
        self._end = threading.Event()

    def leave(self, name: str, note: Mapping[str, Any]) -> None:
        """Tell that this worker's files in the folder ``name`` are complete."""
        self._folder.write_json(_note(name, self._share.rank), dict(note))

    def take(self, name: str) -> Iterator[dict[str, Any]]:
        """What each other worker has told of the folder ``name``, as soon as it has; nothing is left of it.

        Raises StorageError if one cannot.
        """
        for rank in range(1, self._share.of):
            yield json.loads(self._awaited(name, rank))
            self._folder.delete(_note(name, rank))

    def end_soon(self) -> None:
        """Wait a moment longer, and no more."""
        timer = threading.Timer(GRACE_S, self._end.set)
        timer.daemon = True
        timer.start()

    def _awaited(self, name: str, rank: int) -> bytes:
        folder = self._folder
        while not self._end.wait(LOOK_S[folder.is_local]):
            with suppress(RunNotFoundError, RecordError):
                return folder.read_bytes(_note(name, rank))
            if folder.is_local and not folder.exists(name):  # it was deleted by who could not write
                break
        raise StorageError(f"worker {rank} has not written its part")


def _note(name: str, rank: int) -> str:
    return f"{name}/written-{rank:05d}.json"
