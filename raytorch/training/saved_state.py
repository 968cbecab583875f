"""What a checkpoint holds, for whoever puts it to use: read when it is needed, and no more of it than is needed."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raytorch.errors import CheckpointError, ModelFileError, RecordError, RunNotFoundError
from raytorch.runs import checkpoint_manifest
from raytorch.runs.checkpoint_manifest import (
    CHECKPOINT_MANIFEST,
    RESUME_FROM_ANOTHER,
    STATE_FILE,
    STRUCTURE_FILE,
    THE_MODEL,
    checkpoint_name,
    files_of,
    model_file,
    model_names,
    untagged,
)
from raytorch.runs.local_folder import LocalFolder
from raytorch.runs.records import CheckpointManifest
from raytorch.runs.storage import RunFolder
from raytorch.serialization.file_kinds import read_header
from raytorch.serialization.nested_state import LARGEST_STRUCTURE, in_memory, unpacked_state
from raytorch.serialization.saved_tensors import Bytes, PieceFile, SavedTensors
from raytorch.system.temporary_folders import temporary_folder


@contextmanager
def open_checkpoint(folder: RunFolder, name: str, *, in_parts: bool = False) -> Iterator["SavedState"]:
    """The content of a checkpoint, for whoever puts it to use in the block.

    From an object store it is fetched first, unless this worker needs it ``in_parts`` alone.

    Raises CheckpointError if it is damaged, or if what it holds is of no use there.
    """
    place = folder.file(name)
    try:
        manifest = checkpoint_manifest.read_manifest(folder, name)
    except RunNotFoundError:
        raise CheckpointError(f"{place}/{CHECKPOINT_MANIFEST} is missing; {RESUME_FROM_ANOTHER}") from None
    checkpoint_manifest.require_format(manifest, place)
    if checkpoint_name(manifest.step) != name:
        raise CheckpointError(
            f"{place}/{CHECKPOINT_MANIFEST} is damaged: it is of step {manifest.step}; {RESUME_FROM_ANOTHER}"
        )
    with explaining_misfit(place), ExitStack() as held:
        files: RunFolder | LocalFolder
        if folder.is_local or in_parts:
            files, inner = folder, f"{name}/"
        else:
            copy = held.enter_context(folder.local_copy(name, manifest.files))
            files, inner, place = LocalFolder(str(copy)), "", str(copy)
        yield SavedState(Path(place), manifest, lambda file: files.ranges(f"{inner}{file}"), held)


class SavedState:
    """A checkpoint whose files are open. Its methods raise CheckpointError for what is missing, cut short or damaged.

    Args:
        place: Where it is, as errors name it.
        manifest: What it says of itself.
        opened: Opens one of its files.
        held: What closes the files.
    """

    def __init__(
        self,
        place: Path,
        manifest: CheckpointManifest,
        opened: Callable[[str], AbstractContextManager[Bytes]],
        held: ExitStack,
    ) -> None:
        self._place, self.manifest, self._opened, self._held = place, manifest, opened, held
        self._tensors: dict[str, SavedTensors] = {}

    @property
    def models(self) -> list[str]:
        """The names of the models that it has."""
        return model_names(self.manifest.files)

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors that were read until now."""
        return sum(tensors.bytes_read for tensors in self._tensors.values())

    def model(self, device: torch.device, name: str = THE_MODEL) -> dict[str, Tensor]:
        """A model's state dict on ``device``."""
        with _telling_damage():
            return {key: tensor.read().to(device) for key, tensor in self.weights(name).items()}

    def weights(self, name: str = THE_MODEL) -> SavedTensors:
        """A model's tensors, to be read."""
        return self._tensors_of(model_file(name))

    def state(self) -> dict[str, Any]:
        """The ``state`` that was given when it was saved, on the CPU."""
        with _telling_damage():
            state: dict[str, Any] = in_memory(self.state_to_read())
        return state

    def state_to_read(self) -> dict[str, Any]:
        """:meth:`state` with tensors that are still to be read; made anew each time."""
        tensors, name = self._tensors_of(STATE_FILE), (files_of(self.manifest, STRUCTURE_FILE) or [STRUCTURE_FILE])[0]
        with _telling_damage():
            file = self._open(name)
            text = bytearray(min(file.size, LARGEST_STRUCTURE + 1))
            file.read_into(0, memoryview(text))
            state = unpacked_state(bytes(text), tensors, self._place / name)
            self._require_same(name, bytes(text))
        return state

    def _tensors_of(self, name: str) -> SavedTensors:
        if name not in self._tensors:
            files = files_of(self.manifest, name) or [name]
            with _telling_damage():
                self._tensors[name] = SavedTensors(map(self._piece_file, files))
        return self._tensors[name]

    def _piece_file(self, name: str) -> PieceFile:
        file = PieceFile(self._place / name, self._open(name))
        self._require_same(name, file.head)
        return file

    def _open(self, name: str) -> Bytes:
        path, expected = self._place / name, self.manifest.files.get(name)
        try:
            file = self._held.enter_context(self._opened(name))
        except (FileNotFoundError, RunNotFoundError, RecordError):
            raise CheckpointError(f"{path} is missing, or no file; {RESUME_FROM_ANOTHER}") from None
        if file.size != expected:
            raise CheckpointError(f"{path} has {file.size} bytes instead of {expected}; {RESUME_FROM_ANOTHER}")
        return file

    def _require_same(self, name: str, content: bytes) -> None:
        _require_same(self.manifest, self._place / name, name, content)


@contextmanager
def model_of_checkpoint(folder: RunFolder, name: str, model: str = THE_MODEL) -> Iterator[Path]:
    """The path by which readers of files take a checkpoint's model, here for as long as the block runs.

    The model may be in several files. Raises ModelFileError for a file of another save.
    """
    manifest, whole = checkpoint_manifest.read_manifest(folder, name), model_file(model)
    files = files_of(manifest, whole)
    with nullcontext(Path(folder.file(name))) if folder.is_local else _fetched(folder, name, files) as path:
        for file in files:
            if head := _head(path / untagged(file)):
                _require_same(manifest, path / untagged(file), file, head)
        yield path / whole


@contextmanager
def _fetched(folder: RunFolder, name: str, files: Iterable[str]) -> Iterator[Path]:
    """Those files of a checkpoint that are there, in a local folder, without the tags of their names."""
    with temporary_folder() as copy:
        for file in files:
            with suppress(RunNotFoundError):  # which is told by who reads it
                folder.fetch(f"{name}/{file}", copy / untagged(file))
        yield copy


def _head(path: Path) -> bytes | None:
    """The header of a file; None of what is not there, or damaged, which is told by who reads it."""
    with suppress(ModelFileError, OSError), path.open("rb") as file:
        return read_header(path, path.stat().st_size, file.read)
    return None


def _require_same(manifest: CheckpointManifest, path: Path, name: str, content: bytes) -> None:
    """Refuse a file of which the manifest says that it begins otherwise, or is otherwise. Raises ModelFileError."""
    digest = manifest.digests.get(name)
    if digest is None and manifest.format >= checkpoint_manifest.CHECKPOINT_FORMAT:
        raise ModelFileError(f"{path} is damaged: {CHECKPOINT_MANIFEST} has no digest of it")
    if digest not in (None, hashlib.sha256(content).hexdigest()):
        raise ModelFileError(
            f"{path} is damaged: it is another than was saved with {CHECKPOINT_MANIFEST}; fetch it again"
        )


@contextmanager
def _telling_damage() -> Iterator[None]:
    try:
        yield
    except ModelFileError as error:
        raise CheckpointError(f"{error}; or {RESUME_FROM_ANOTHER}") from None


@contextmanager
def explaining_misfit(path: str) -> Iterator[None]:
    """Raise as CheckpointError that the checkpoint at ``path`` cannot be put to use in the block, or is damaged."""
    try:
        with _telling_damage():
            yield
    except torch.OutOfMemoryError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise CheckpointError(
            f"{path} does not fit the run ({reason}): another configuration or raytorch has saved it; resume with "
            f"those that its {CHECKPOINT_MANIFEST} names, or begin a new run"
        ) from error
