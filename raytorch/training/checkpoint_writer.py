"""Writing checkpoints while the training goes on: what a worker has is copied, and a thread writes the copy.

Workers that write one together each leave a note beside their files when these are complete, for which rank 0 waits.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import deepcopy
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
NICE = 15
"""How much the writing thread gives way to the training: beside a thread that computes it has a thirtieth of a core."""
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
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=_give_way)
        self._writing: Future[None] | None = None
        self._notes = Notes(folder, share)
        self.last_step: int | None = None
        """The step of the newest checkpoint, also of one that was there before."""
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
        replaces, self.last_step = manifest["step"] == self.last_step, manifest["step"]
        if replaces and not self._folder.is_local:  # what is there counts until the new manifest is
            content = content.named_apart(save[:8])
        self._writing = self._thread.submit(self._write, content, save, deepcopy(manifest), replaces=replaces)
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

    def _write(self, content: Content, save: str, manifest: dict[str, Any], *, replaces: bool) -> None:
        began = time.perf_counter()
        name = checkpoint_name(manifest["step"])
        with self._telling_faults(f"{STAGING}{save}", None if replaces else name) as staged:
            self._finish(staged, save, write_files(content, staged, save), manifest)
        self._completed(name, manifest)
        self.written_s += time.perf_counter() - began

    def _finish(self, staged: Path, save: str, written: Written, manifest: dict[str, Any]) -> None:
        """Hand in what this worker has written, which rank 0 completes."""
        folder = self._folder
        name = staged.name if folder.is_local else checkpoint_name(manifest["step"])
        if not folder.is_local:
            folder.upload(staged, name)
            shutil.rmtree(staged)
        self._notes.leave(name, save, asdict(written))

    def _completed(self, name: str, manifest: dict[str, Any]) -> None:
        """What follows when all is written."""

    @contextmanager
    def _telling_faults(self, staging: str, name: str | None) -> Iterator[Path]:
        """A local folder to write into; no half of a checkpoint is left behind where something fails in the block.

        A full disk would stay full. ``name`` is the place in a store, if nothing was there before.
        """
        folder, staged = self._folder, None
        try:
            staged = self._staged(staging) if folder.is_local else make_temporary()
            yield staged
        except BaseException as error:
            if staged:
                shutil.rmtree(staged, ignore_errors=True)
            if name and not folder.is_local and not self._share.rank:
                with suppress(UserError, OSError):
                    folder.delete(name)
            if not isinstance(error, OSError | SafetensorError | StorageError | ModelFileError):
                raise
            raise StorageError(
                f"{self._folder}: a checkpoint cannot be written: {error}; free space there, lower checkpoint.keep or "
                "save less often, and resume it",
                remedies=[Remedy("resume", str(self._folder))],
            ) from error

    def _staged(self, staging: str) -> Path:
        """The folder that rank 0 makes for all; once it is deleted, by who could not write, nobody makes it again."""
        if self._share.rank:
            self._notes.await_folder(staging)
            return Path(self._folder.file(staging))
        return Path(self._folder.make(staging))


def _give_way() -> None:
    """Let this thread have what the training leaves of the CPU, where the system has priorities of threads."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


class Notes:
    """What workers tell rank 0 by files beside those that they have written of a checkpoint."""

    def __init__(self, folder: RunFolder, share: Share) -> None:
        self._folder, self._share = folder, share
        self._end = threading.Event()

    def leave(self, name: str, save: str, note: Mapping[str, Any]) -> None:
        """Tell that this worker's files of a save in the folder ``name`` are complete."""
        self._folder.write_json(_note(name, save, self._share.rank), dict(note))

    def take(self, name: str, save: str) -> Iterator[dict[str, Any]]:
        """What each other worker has told of a save, as soon as it has; nothing is left of it.

        Raises StorageError if one cannot.
        """
        for rank in range(1, self._share.of):
            note = _note(name, save, rank)
            yield json.loads(self._awaited(name, note, rank))
            self._folder.delete(note)

    def await_folder(self, name: str) -> None:
        """Return when the folder is there. Raises StorageError if the run ends before."""
        while not self._folder.exists(name):
            if self._end.wait(LOOK_S[True]):
                raise StorageError("worker 0 has not begun to write")

    def end_soon(self) -> None:
        """Wait a moment longer, and no more."""
        timer = threading.Timer(GRACE_S, self._end.set)
        timer.daemon = True
        timer.start()

    def _awaited(self, name: str, note: str, rank: int) -> bytes:
        folder, is_over = self._folder, False
        while not is_over:
            with suppress(RunNotFoundError, RecordError):
                return folder.read_bytes(note)
            is_deleted = folder.is_local and not folder.exists(name)  # by who could not write
            is_over = is_deleted or self._end.wait(LOOK_S[folder.is_local])
        raise StorageError(f"worker {rank} has not written its part")


def _note(name: str, save: str, rank: int) -> str:
    return f"{name}/written-{save[:8]}-{rank:05d}.json"
