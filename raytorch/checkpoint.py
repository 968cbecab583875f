"""Checkpoints of a run, saved and restored through Ray Train.

A checkpoint is a folder ``checkpoint_<step>`` of the run with

- ``model.safetensors``: the model's weights and buffers, and what it was built from,
- ``state.pt``: optimizer, schedule, loader and random-number generators, loadable with ``weights_only=True``,
- ``checkpoint.json``: step, epoch, metrics, configuration, versions, and the size of each file; written last.

Nothing in it can run code. It is made beside the run and moved into place whole, so a process that is killed while it
saves leaves no checkpoint rather than half of one.
"""

import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray.train
import torch
from torch import Tensor, nn

from raytorch.errors import CheckpointError, ModelFileError, RecordError
from raytorch.models import Architecture
from raytorch.records import CheckpointManifest, parse_record
from raytorch.runs import CHECKPOINT_MANIFEST, CHECKPOINT_NAME, CHECKPOINT_PREFIX, MODEL_FILE, is_complete_checkpoint
from raytorch.serialization import load_state, load_weights, save_model
from raytorch.storage import RunFolder

STATE_FILE = "state.pt"
STAGING = ".saving-"
_STAGED = re.compile(rf"{re.escape(STAGING)}[0-9a-f]{{32}}")
FORMAT = 1

logger = logging.getLogger("raytorch")


def report_checkpoint(
    folder: RunFolder,
    model: nn.Module,
    architecture: Architecture,
    state: dict[str, Any],
    manifest: dict[str, Any],
    metrics: dict[str, float],
) -> None:
    """Save a checkpoint and report it to Ray Train, which uploads it while training goes on.

    To be called by rank 0, while all other ranks call :func:`report_metrics` with the same metrics.

    Args:
        folder: The run's folder.
        model: The bare model, not its DDP wrapper.
        architecture: What it was built from.
        state: Nested dicts and lists of tensors and plain values.
        manifest: ``step`` and whatever else a reader should know; JSON types only.
        metrics: By which Ray Train ranks the checkpoint.
    """
    staged = _stage(folder, model, architecture, state, manifest)

    def move_into_place(checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        return _publish(folder, Path(checkpoint.path), name)

    ray.train.report(
        metrics,
        checkpoint=ray.train.Checkpoint.from_directory(staged),
        checkpoint_dir_name=checkpoint_name(manifest["step"]),
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
        checkpoint_upload_fn=move_into_place,
        delete_local_checkpoint_after_upload=False,
    )


def report_metrics(metrics: dict[str, float], step: int) -> None:
    """The other ranks' part in :func:`report_checkpoint`."""
    ray.train.report(
        metrics,
        checkpoint_dir_name=checkpoint_name(step),
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
    )


def checkpoint_name(step: int) -> str:
    """Name of the checkpoint's folder after so many optimizer steps."""
    return f"{CHECKPOINT_PREFIX}{step:08d}"


def delete_leftovers(folder: RunFolder) -> None:
    """Delete what killed processes left of checkpoints that they had not finished."""
    for name in folder.folders():
        if _STAGED.fullmatch(name) or (CHECKPOINT_NAME.fullmatch(name) and not is_complete_checkpoint(folder, name)):
            folder.delete(name)


@contextmanager
def open_checkpoint(checkpoint: ray.train.Checkpoint) -> Iterator["SavedState"]:
    """The content of a checkpoint, fetched from its storage if need be."""
    with checkpoint.as_directory() as path:
        yield SavedState(Path(path))


class SavedState:
    """A checkpoint in a local folder.

    Raises:
        CheckpointError: A file is missing, cut short, damaged, or of another format.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        path = self._existing(CHECKPOINT_MANIFEST)
        try:
            content = parse_record(path.read_bytes(), str(path), CheckpointManifest)
        except RecordError as error:
            raise CheckpointError(f"{error}; resume from another checkpoint of the run") from None
        if content.format != FORMAT:
            raise CheckpointError(f"{folder} has format {content.format}; this raytorch reads format {FORMAT}")
        self.manifest, self._sizes = content.model_dump(), content.files

    def model(self, device: torch.device) -> dict[str, Tensor]:
        """The model's state dict on ``device``."""
        path = self._checked(MODEL_FILE)
        with _refusing_damage():
            return load_weights(path, device)

    def state(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        """What was given as ``state`` when it was saved."""
        path = self._checked(STATE_FILE)
        with _refusing_damage():
            state: dict[str, Any] = load_state(path, device)
        return state

    def _existing(self, name: str) -> Path:
        path = self._folder / name
        if not path.exists():
            raise CheckpointError(f"{path} is missing; resume from another checkpoint of the run")
        return path

    def _checked(self, name: str) -> Path:
        path = self._existing(name)
        size, expected = path.stat().st_size, self._sizes.get(name)
        if size != expected:
            raise CheckpointError(f"{path} has {size} bytes instead of {expected}; resume from another checkpoint")
        return path


@contextmanager
def _refusing_damage() -> Iterator[None]:
    try:
        yield
    except ModelFileError as error:
        raise CheckpointError(f"{error}; or resume from another checkpoint of the run") from None


def _stage(
    folder: RunFolder, model: nn.Module, architecture: Architecture, state: dict[str, Any], manifest: dict[str, Any]
) -> Path:
    """Write a checkpoint's files into a new folder, beside their place where the storage is local."""
    if folder.is_local:
        staged = Path(folder.path, f"{STAGING}{uuid4().hex}")  # mkdtemp's folder only its owner could read
        staged.mkdir(parents=True)
    else:
        staged = Path(tempfile.mkdtemp(prefix=STAGING))
    save_model(model, staged / MODEL_FILE, architecture)
    torch.save(state, staged / STATE_FILE)
    sizes = {path.name: path.stat().st_size for path in staged.iterdir()}
    (staged / CHECKPOINT_MANIFEST).write_text(json.dumps({"format": FORMAT, "files": sizes, **manifest}, indent=2))
    return staged


def _publish(folder: RunFolder, staged: Path, name: str) -> ray.train.Checkpoint:
    """Make a staged checkpoint appear under its name, complete from the first moment on."""
    folder.delete(name)  # a killed attempt may have got this far without being registered
    if folder.is_local:
        staged.replace(folder.file(name))
    else:
        manifest = staged / CHECKPOINT_MANIFEST
        text = manifest.read_text()
        manifest.unlink()
        folder.upload(staged, name)
        folder.write_text(f"{name}/{CHECKPOINT_MANIFEST}", text)
        shutil.rmtree(staged)
    logger.info("saved %s", name)
    return ray.train.Checkpoint(folder.file(name), folder.filesystem)
