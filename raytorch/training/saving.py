"""The part that each worker has in the checkpoints of a run: rank 0 alone, or all where models are divided."""

import time
from collections.abc import Callable, Mapping
from secrets import randbits
from typing import Any

import torch

from raytorch.config import RunConfig
from raytorch.distributed.collectives import all_gather, all_reduce, broadcast
from raytorch.distributed.worker import Worker
from raytorch.errors import ConfigError
from raytorch.runs.checkpoint_manifest import checkpoint_step
from raytorch.runs.storage import RunFolder
from raytorch.training.checkpoint_files import Models, Share
from raytorch.training.checkpoint_writer import ALONE, CheckpointWriter
from raytorch.training.checkpoints import Checkpoints

SEEN_S = 30.0
"""Longest wait for a file of rank 0's to be seen by the others, whose systems may look only every few seconds."""


class Saving:
    """Saves a run's checkpoints, as all its workers ask for them in the same steps.

    Args:
        config: The run's configuration.
        worker: This worker.
        folder: The run's folder.
        on_saved: Called on rank 0 once a checkpoint is complete in the folder.
        is_shared: Whether each worker writes its parts of the models.
    """

    def __init__(
        self,
        config: RunConfig,
        worker: Worker,
        folder: RunFolder,
        on_saved: Callable[[], object],
        *,
        is_shared: bool,
    ) -> None:
        self._config, self._worker, self._folder, self._on_saved = config, worker, folder, on_saved
        self._is_shared = is_shared
        self._writer: CheckpointWriter | None = None
        self._skipped = 0
        self._before = {"saved": 0, "skipped": 0, "blocked_s": 0.0, "written_s": 0.0}

    def begin(self) -> int | None:
        """Put the run's folder in order; the step of its newest checkpoint, the same on all workers.

        Raises ConfigError if workers that write together see different folders.
        """
        keys, share, newest = self._config.checkpoint, self._share(), None
        if self._worker.rank == 0:
            self._writer = checkpoints = Checkpoints(
                self._folder, keys.keep, self._config.ranking, self._on_saved, share, background=keys.background
            )
            newest = checkpoints.recover()
        elif self._is_shared:
            self._writer = CheckpointWriter(self._folder, share, background=keys.background)
        step = int(broadcast(self._number(checkpoint_step(newest) if newest else -1)))
        if self._writer:
            self._writer.last_step = step
        return step if step >= 0 else None

    @property
    def is_part(self) -> bool:
        """True if this worker writes anything."""
        return self._writer is not None

    def is_skipped(self) -> bool:
        """Tell whether a checkpoint that is due is to be left out, as the one before is still being written; all
        workers ask together.
        """
        if self._config.checkpoint.when_busy == "wait":
            return False
        is_busy = bool(self._writer and self._writer.is_busy)
        is_skipped = bool(all_reduce(self._number(is_busy)).item())
        self._skipped += is_skipped
        return is_skipped

    def save(self, models: Models, state: dict[str, Any], manifest: dict[str, Any]) -> None:
        """Begin to write a checkpoint; see :meth:`CheckpointWriter.save`. Workers that have a part in it call it."""
        assert self._writer
        self._writer.save(models, state, manifest)

    def look(self) -> None:
        """Raise StorageError if the newest checkpoint could not be written, as far as that is known."""
        if self._writer:
            self._writer.look()

    def wait(self) -> None:
        """Return once what was saved is written. Raises StorageError if it cannot be."""
        if self._writer:
            self._writer.wait()

    def close(self) -> None:
        """End, also of a run that has failed."""
        if self._writer:
            self._writer.close()

    def taken(self) -> dict[str, Any]:
        """What checkpoints have taken until now, as ``summary.json`` tells it, since the run began."""
        writer = self._writer
        now = {
            "saved": writer.saved if writer else 0,
            "skipped": self._skipped,
            "blocked_s": writer.blocked_s if writer else 0.0,
            "written_s": writer.written_s if writer else 0.0,
        }
        return {name: round(value + self._before[name], 3) for name, value in now.items()}

    def restore(self, taken: Mapping[str, Any]) -> None:
        """Count on from what an earlier attempt has :meth:`taken`."""
        for name in self._before.keys() & taken.keys():
            if type(taken[name]) not in (int, float) or not 0 <= taken[name] < 2**53:
                raise ValueError(f"{name} of checkpoints {taken[name]!r:.99}")
            self._before[name] = taken[name]

    def _share(self) -> Share:
        if not self._is_shared:
            return ALONE
        token = f"{int(broadcast(self._number(randbits(62)))):016x}"
        if self._folder.is_local:
            self._require_one_folder(token)
        return Share(self._worker.rank, self._worker.world_size, token)

    def _require_one_folder(self, token: str) -> None:
        """Refuse a folder that is another one on another node, where a checkpoint would never be complete."""
        mark = f".shared-{token}"
        if self._worker.rank == 0:
            self._folder.write_text(mark, "")
        all_reduce(self._number(0))
        deadline = time.monotonic() + SEEN_S
        while not (is_seen := self._folder.exists(mark)) and time.monotonic() < deadline:
            time.sleep(0.1)
        seen = [bool(each) for each in all_gather(self._number(is_seen))]
        if self._worker.rank == 0:
            self._folder.delete(mark)
        if not all(seen):
            raise ConfigError(
                f"storage: {self._folder} is another folder for worker {seen.index(False)} than for worker 0, and each "
                "of them writes its part of a checkpoint there; give a folder that all nodes share, or s3://bucket/runs"
            )

    def _number(self, number: int) -> torch.Tensor:
        return torch.tensor(number, device=self._worker.device)
