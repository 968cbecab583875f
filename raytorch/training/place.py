"""Where a run is in its data: the passes over it that its loop makes, one after the other."""

from typing import Any

import torch

from raytorch.datasets import TrainLoader
from raytorch.distributed.worker import Worker
from raytorch.training.checkpoints import explaining_misfit
from raytorch.training.parts import Parts
from raytorch.training.reproducibility import restore_generators


class Place:
    """The place of a run, which begins at that of the checkpoint in ``parts.restored``.

    Attributes:
        loader: That of the newest pass.
        is_replaying: Whether the loop has still to come to where the checkpoint was saved.
    """

    def __init__(self, parts: Parts, worker: Worker, seed: int) -> None:
        self._parts, self._worker, self._seed = parts, worker, seed
        self.loader: TrainLoader | None = None
        self.is_replaying = False
        self._passes: list[int] = []
        """After how many steps each began, oldest first."""
        self._registered: list[str] = []
        """What was registered when the newest began."""
        self._samples_before = 0
        """Samples of the passes before the newest."""

    @property
    def samples_seen(self) -> int:
        """Samples of all passes until now."""
        return self._samples_before + self._samples_of_pass()

    @property
    def epochs_done(self) -> float:
        """Epochs of the newest pass until now."""
        return self.loader.epoch + self.loader.position / self.loader.samples if self.loader else 0.0

    @property
    def is_at_end_of_epoch(self) -> bool:
        """True if every sample of this epoch has been seen."""
        return self.loader is not None and self.loader.position == self.loader.samples

    def restore(self, state: dict[str, Any], step: int) -> None:
        """Go on after ``step`` steps from :meth:`state_dict`. Raises ValueError for what is damaged."""
        passes, ended = state["passes"], state["ended"]
        if type(passes) is not list or not all(type(began) is int and 0 <= began <= step for began in passes):
            raise ValueError("passes")
        if type(ended) is not int or len(passes) - ended not in (0, 1) or passes != sorted(passes):
            raise ValueError("passes")
        if step and not passes:
            raise ValueError("no passes")
        self.is_replaying = True

    def state_dict(self, *, is_within: bool) -> dict[str, Any]:
        """What a checkpoint keeps of it; ``is_within`` says whether the newest pass goes on."""
        return {
            "passes": self._passes,
            "ended": len(self._passes) - is_within,
            "registered": self._registered,
            "loader": self.loader and self.loader.state_dict(),
        }

    def enter(self, loader: TrainLoader, step: int) -> int | None:
        """Begin a pass after so many steps, or go on in it; answers when it began, None if it is done."""
        self._samples_before, self.loader = self.samples_seen, loader
        number, restored = len(self._passes), self._parts.restored
        if number:
            loader.begin_pass(number)
        began: list[int] = restored.state["passes"][number:] if restored and self.is_replaying else []
        self._registered = self._parts.registered
        self._passes.append(began[0] if began else step)
        if restored is None or not began:
            self.reach()
            if number == 0:  # from here on, dropout draws differently on each worker
                torch.manual_seed(self._seed + 1 + self._worker.rank)
            return step
        if len(began) > 1:
            return None
        with explaining_misfit(restored.name):
            loader.load_state_dict(restored.state["loader"])
            restore_generators(restored.state["generators"], self._worker, seed=self._seed + step)
        self.reach()
        return None if restored.state["ended"] > number else began[0]

    def reach(self) -> None:
        """Take note that the loop is where the checkpoint was saved. Raises CheckpointError for parts that it lacks."""
        if self.is_replaying and self._parts.restored:
            self._parts.restored.reach()
        self.is_replaying = False

    def _samples_of_pass(self) -> int:
        return self.loader.epoch * self.loader.samples + self.loader.position if self.loader else 0
