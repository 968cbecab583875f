"""Checkpoints of a run, which rank 0 saves into the run's folder and all ranks restore from there.

A checkpoint is a folder ``checkpoint_<step>`` of the run with

- ``model.safetensors``: the model's weights and buffers, and what it was built from; of a loop with several models
  ``model-<name>.safetensors`` for each,
- ``state.json`` and ``state.safetensors``: what else the loop keeps, its place in the data and random-number generators
  (see :mod:`raytorch.serialization.nested_state`),
- ``checkpoint.json``: step, epoch, metrics, configuration, versions, and the size of each file; written last.

Nothing in it can run code. It is made beside its place and moved there whole, so a process that is killed while it
saves leaves no checkpoint rather than half of one. The run's folder is the truth: what is complete there counts, and
nothing else is written down of it.
"""

import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from raytorch.config import Ranking
from raytorch.errors import CheckpointError, ModelFileError, Remedy, RunNotFoundError, StorageError
from raytorch.models.networks import Architecture
from raytorch.runs import checkpoint_manifest
from raytorch.runs.checkpoint_manifest import (
    CHECKPOINT_FORMAT,
    CHECKPOINT_MANIFEST,
    RESUME_FROM_ANOTHER,
    THE_MODEL,
    model_file,
    model_names,
)
from raytorch.runs.records import CheckpointManifest
from raytorch.runs.storage import RunFolder
from raytorch.serialization import load_tensors, save_model, save_tensors
from raytorch.serialization.nested_state import STRUCTURE_FILE, TENSORS_FILE, load_saved_state, save_state
from raytorch.system.safe_text import without_secrets
from raytorch.system.strict_json import to_json
from raytorch.system.temporary_folders import make_temporary

STAGING = ".saving-"

_STAGED = re.compile(rf"{re.escape(STAGING)}[0-9a-f]{{32}}")
logger = logging.getLogger("raytorch")


Models = Mapping[str, tuple[nn.Module, Architecture | None]]
"""By name a model, and what it was built from."""


class Checkpoints:
    """The checkpoints in a run's folder, in the hands of rank 0.

    At any time there are at most ``keep`` + 2: the best, the latest, and the one that is being saved.

    Args:
        folder: The run's folder.
        keep: How many, of the best and the latest.
        ranking: The order of those that were evaluated.
        on_saved: Called once a checkpoint is complete in the folder.
    """

    def __init__(self, folder: RunFolder, keep: int, ranking: Ranking, on_saved: Callable[[], object]) -> None:
        self._folder, self._keep, self._ranking, self._on_saved = folder, keep, ranking, on_saved
        self._kept: dict[str, tuple[float, int]] = {}
        """The complete checkpoints, by name, each with what it is ranked by."""
        self._uploads = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._upload: Future[None] | None = None

    def recover(self) -> str | None:
        """Put the folder in order after whatever happened to earlier attempts; the name of its newest checkpoint.

        What was complete but not yet in place is put there, and what was not is deleted.
        """
        folder = self._folder
        for staged in filter(_STAGED.fullmatch, folder.folders() if folder.is_local else []):
            if checkpoint_manifest.is_complete_checkpoint(folder, staged):
                name = checkpoint_manifest.checkpoint_name(checkpoint_manifest.read_manifest(folder, staged).step)
                if not checkpoint_manifest.is_complete_checkpoint(folder, name):
                    folder.delete(name)
                    Path(folder.file(staged)).replace(folder.file(name))
                    logger.info("put %s in place, which an earlier attempt had written", name)
            folder.delete(staged)
        for name in checkpoint_manifest.checkpoint_names(folder):
            if checkpoint_manifest.is_complete_checkpoint(folder, name):
                manifest = checkpoint_manifest.read_manifest(folder, name)
                self._kept[name] = self._rank(name, manifest.metrics if manifest.evaluated else {})
            else:
                folder.delete(name)
        self._prune()
        return max(self._kept, key=checkpoint_manifest.checkpoint_step, default=None)

    def save(self, models: Models, state: dict[str, Any], manifest: dict[str, Any]) -> None:
        """Save a checkpoint: into a local folder at once, to an object store while training goes on.

        One that is still on its way there is waited for first. Raises StorageError, and ModelFileError for more than
        could be read again.

        Args:
            models: The bare models by name, not their DDP wrappers, each with what it was built from if that is known.
            state: Nested dictionaries and lists of tensors and of what JSON has.
            manifest: ``step``, ``metrics``, whether they are those of this very model (``evaluated``), and whatever
                else a reader should know; JSON types only.
        """
        self.wait()
        staged = _stage(self._folder, models, state, manifest)
        if self._folder.is_local:
            self._publish(staged, manifest)
        else:
            self._upload = self._uploads.submit(self._publish, staged, manifest)

    def wait(self) -> None:
        """Return once what was saved is complete in the folder. Raises StorageError if it cannot be written there."""
        upload, self._upload = self._upload, None
        if upload:
            upload.result()

    def _publish(self, staged: Path, manifest: dict[str, Any]) -> None:
        """Make a staged checkpoint appear under its name, complete from the first moment on."""
        folder, name = self._folder, checkpoint_manifest.checkpoint_name(manifest["step"])
        with _telling_faults(folder, staged):
            folder.delete(name)
            if folder.is_local:
                staged.replace(folder.file(name))
            else:
                _send(folder, staged, name)
            logger.info("saved %s", name)
            self._kept[name] = self._rank(name, manifest["metrics"] if manifest["evaluated"] else {})
            self._prune()
        self._on_saved()

    def _prune(self) -> None:
        """Keep the best, and the latest."""
        ranked = sorted(self._kept, key=self._kept.__getitem__)
        latest = max(self._kept, key=checkpoint_manifest.checkpoint_step, default=None)
        for name in ranked[: -self._keep]:
            if name != latest:
                self._folder.delete(name)
                del self._kept[name]

    def _rank(self, name: str, metrics: dict[str, float]) -> tuple[float, int]:
        """Higher is better: by the metric, and without one of its own below all that have; among equals the newer."""
        return self._ranking.score(metrics), checkpoint_manifest.checkpoint_step(name)


@contextmanager
def open_checkpoint(folder: RunFolder, name: str) -> Iterator["SavedState"]:
    """The content of a checkpoint, fetched from its storage if need be, for whoever puts it to use in the block.

    Raises CheckpointError if it is damaged, or if what it holds is of no use there.
    """
    place = folder.file(name)
    try:
        manifest = checkpoint_manifest.read_manifest(folder, name)
    except RunNotFoundError:
        raise CheckpointError(f"{place}/{CHECKPOINT_MANIFEST} is missing; {RESUME_FROM_ANOTHER}") from None
    checkpoint_manifest.require_format(manifest, place)
    models = model_names(manifest.files)
    files = (*map(model_file, models), STRUCTURE_FILE, TENSORS_FILE)
    with explaining_misfit(place), folder.local_copy(name, files) as path:
        yield SavedState(path, manifest)


class SavedState:
    """A checkpoint in a local folder. Its methods raise CheckpointError for what is missing, cut short or damaged."""

    def __init__(self, folder: Path, manifest: CheckpointManifest) -> None:
        self._folder, self.manifest = folder, manifest

    @property
    def models(self) -> list[str]:
        """The names of the models that it has."""
        return model_names(self.manifest.files)

    def model(self, device: torch.device, name: str = THE_MODEL) -> dict[str, Tensor]:
        """A model's state dict on ``device``."""
        file = model_file(name)
        with self._checked(file):
            return load_tensors(self._folder / file, device)

    def state(self) -> dict[str, Any]:
        """The ``state`` that was given when it was saved, on the CPU."""
        with self._checked(STRUCTURE_FILE, TENSORS_FILE):
            return load_saved_state(self._folder)

    @contextmanager
    def _checked(self, *names: str) -> Iterator[None]:
        """Refuse files that are not there in full size, and what the block finds damaged as it reads them."""
        for name in names:
            path = self._folder / name
            if not path.is_file():
                raise CheckpointError(f"{path} is missing, or no file; {RESUME_FROM_ANOTHER}")
            size, expected = path.stat().st_size, self.manifest.files.get(name)
            if size != expected:
                raise CheckpointError(f"{path} has {size} bytes instead of {expected}; {RESUME_FROM_ANOTHER}")
        try:
            yield
        except ModelFileError as error:
            raise CheckpointError(f"{error}; or {RESUME_FROM_ANOTHER}") from None


@contextmanager
def explaining_misfit(path: str) -> Iterator[None]:
    """Raise as CheckpointError that the checkpoint at ``path`` cannot be put to use in the block."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise CheckpointError(
            f"{path} does not fit the run ({reason}): another configuration or raytorch has saved it; resume with "
            f"those that its {CHECKPOINT_MANIFEST} names, or begin a new run"
        ) from error


def _stage(folder: RunFolder, models: Models, state: dict[str, Any], manifest: dict[str, Any]) -> Path:
    """Write a checkpoint's files into a new folder, beside their place where the storage is local."""
    staged = Path(folder.make(f"{STAGING}{uuid4().hex}")) if folder.is_local else make_temporary()
    with _telling_faults(folder, staged):
        for name, (model, architecture) in models.items():
            if architecture is None:
                save_tensors(model.state_dict(), staged / model_file(name))
            else:
                save_model(model, staged / model_file(name), architecture)
        save_state(state, staged)
        sizes = {path.name: path.stat().st_size for path in staged.iterdir()}
        text = without_secrets(to_json({"format": CHECKPOINT_FORMAT, "files": sizes, **manifest}, indent=2))
        (staged / CHECKPOINT_MANIFEST).write_text(text, encoding="utf-8")
    return staged


def _send(folder: RunFolder, staged: Path, name: str) -> None:
    """Move a local folder to an object store: the manifest, without which it is no checkpoint, goes last."""
    manifest = staged / CHECKPOINT_MANIFEST
    text = manifest.read_text(encoding="utf-8")
    manifest.unlink()
    folder.upload(staged, name)
    folder.write_text(f"{name}/{CHECKPOINT_MANIFEST}", text)
    shutil.rmtree(staged)


@contextmanager
def _telling_faults(folder: RunFolder, staged: Path) -> Iterator[None]:
    """Leave no half of a checkpoint behind where the storage fails in the block, as a full disk would stay full, or
    where it could not be read again."""
    try:
        yield
    except (OSError, SafetensorError, StorageError, ModelFileError) as error:
        shutil.rmtree(staged, ignore_errors=True)
        if isinstance(error, ModelFileError):
            raise
        raise StorageError(
            f"{folder}: a checkpoint cannot be written: {error}; free space there, lower checkpoint.keep or save less "
            "often, and resume it",
            remedies=[Remedy("resume", str(folder))],
        ) from error
