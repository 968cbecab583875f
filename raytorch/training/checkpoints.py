"""Checkpoints of a run, which are written into the run's folder while the training goes on, and restored from there.

A checkpoint is a folder ``checkpoint_<step>`` of the run with

- ``model.safetensors``: the model's weights and buffers, and what it was built from; of a loop with several models
  ``model-<name>.safetensors`` for each,
- ``state.json`` and ``state.safetensors``: what else the loop keeps, its place in the data and random-number generators
  (see :mod:`raytorch.serialization.nested_state`),
- ``checkpoint.json``: step, epoch, metrics, configuration, versions, and size and digest of each file; written last.

Of models that are divided among workers each writes its pieces, into ``model-00001-of-00004.safetensors`` and so on
(see :mod:`raytorch.serialization.pieces`), and rank 0 completes the checkpoint when all have.

Nothing in it can run code. It is made beside its place and moved there whole, so a process that is killed while it
saves leaves no checkpoint rather than half of one. The run's folder is the truth: what is complete there counts, and
nothing else is written down of it.
"""

import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from raytorch.config import Ranking
from raytorch.errors import StorageError
from raytorch.runs import checkpoint_manifest
from raytorch.runs.checkpoint_manifest import CHECKPOINT_FORMAT, CHECKPOINT_MANIFEST
from raytorch.runs.storage import RunFolder
from raytorch.system.safe_text import without_secrets
from raytorch.system.strict_json import to_json
from raytorch.training.checkpoint_files import Share, Written
from raytorch.training.checkpoint_writer import ALONE, STAGING, CheckpointWriter

_STAGED = re.compile(rf"{re.escape(STAGING)}[0-9a-f]{{32}}")
logger = logging.getLogger("raytorch")


class Checkpoints(CheckpointWriter):
    """The checkpoints in a run's folder, in the hands of rank 0.

    At any time there are at most ``keep`` + 2: the best, the latest, and the one that is being saved.

    Args:
        folder: The run's folder.
        keep: How many, of the best and the latest.
        ranking: The order of those that were evaluated.
        on_saved: Called once a checkpoint is complete in the folder.
        share: Which of the workers that write this one is.
        background: See :class:`~raytorch.training.checkpoint_writer.CheckpointWriter`.
    """

    def __init__(
        self,
        folder: RunFolder,
        keep: int,
        ranking: Ranking,
        on_saved: Callable[[], object],
        share: Share = ALONE,
        *,
        background: bool = True,
    ) -> None:
        super().__init__(folder, share, background=background)
        self._keep, self._ranking, self._on_saved = keep, ranking, on_saved
        self._kept: dict[str, tuple[float, int]] = {}
        """The complete checkpoints, by name, each with what it is ranked by."""

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
        newest = max(self._kept, key=checkpoint_manifest.checkpoint_step, default=None)
        self.last_step = checkpoint_manifest.checkpoint_step(newest) if newest else None
        return newest

    def _finish(self, staged: Path, save: str, written: Written, manifest: dict[str, Any]) -> None:
        """Make the checkpoint appear under its name, complete from the first moment on."""
        folder, name = self._folder, checkpoint_manifest.checkpoint_name(manifest["step"])
        if not folder.is_local:
            folder.upload(staged, name)
            shutil.rmtree(staged)
        for note in self._notes.take(staged.name if folder.is_local else name, save):
            written.add(note)
        text = to_json({"format": CHECKPOINT_FORMAT, **asdict(written), **manifest}, indent=2)
        if folder.is_local:
            (staged / CHECKPOINT_MANIFEST).write_text(without_secrets(text), encoding="utf-8")
            folder.delete(name)
            staged.replace(folder.file(name))
        else:
            before = checkpoint_manifest.files_of_checkpoint(folder, name) if name in self._kept else set()
            folder.write_text(f"{name}/{CHECKPOINT_MANIFEST}", text)
            for file in before - written.files.keys():
                folder.delete(f"{name}/{file}")
        logger.info("saved %s", name)

    def _completed(self, name: str, manifest: dict[str, Any]) -> None:
        self._kept[name] = self._rank(name, manifest["metrics"] if manifest["evaluated"] else {})
        try:
            self._prune()
        except (StorageError, OSError) as error:
            logger.warning("an older checkpoint could not be deleted, which is tried again with the next: %s", error)
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
