"""Where a run is in its data: the passes over it that its loop makes, one after the other."""

from collections.abc import Callable
from typing import Any

import torch

from raytorch.datasets import TrainLoader
from raytorch.distributed.worker import Worker
from raytorch.training.parts import Parts
from raytorch.training.reproducibility import restore_generators
from raytorch.training.saved_state import explaining_misfit


class Place:
    """The place of a run, which begins at that of the checkpoint in ``parts.restored``.

    Attributes:
        loader: That of the newest pass.
        is_replaying: Whether the loop has still to come to where the checkpoint was saved.
        is_left: Whether the loop has left the newest pass before its end.
    """

    def __init__(self, parts: Parts, worker: Worker, seed: int) -> None:
        self._parts, self._worker, self._seed = parts, worker, seed
        self.loader: TrainLoader | None = None
        self.is_replaying = self.is_left = False
        self._restored_at = 0
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
    def readers(self) -> int | None:
        """Processes that read ahead in the newest pass; None if its data is in memory."""
        return self.loader.readers if self.loader else None

    def data_advice(self, *, has_loop: bool) -> str:
        """What is to be done where the run waits for data; empty where it is in memory."""
        if self.readers is None:
            return ""
        if self.readers:
            return "give run.batches more readers" if has_loop else "raise data.readers"
        return "give run.batches readers" if has_loop else "set data.readers"

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
        if (step and not passes) or type(state["left"]) is not bool:
            raise ValueError("no passes")
        self.is_replaying, self._restored_at = True, step

    def state_dict(self, *, is_within: bool) -> dict[str, Any]:
        """What a checkpoint keeps of it; ``is_within`` says whether the newest pass goes on."""
        return {
            "passes": self._passes,
            "ended": len(self._passes) - is_within,
            "left": self.is_left,
            "registered": self._registered,
            "loader": self.loader and self.loader.state_dict(),
        }

    def enter(self, loader: TrainLoader, step: int, is_done: Callable[[int], bool]) -> int | None:
        """Begin a pass after so many steps, or go on in it; answers when it began, None if it is over.

        ``is_done`` tells of a pass that began after so many steps whether nothing is left of it, as configured now.
        """
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
                torch.manual_seed(self._seed + 1 + self._worker.data_rank)
            return step
        if len(began) > 1:
            return None
        with explaining_misfit(restored.name):
            loader.load_state_dict(restored.state["loader"])
        self.is_left = restored.state["left"]
        if restored.state["ended"] > number and (self.is_left or is_done(began[0])):
            restored.reach()
            return None  # and what follows was done before the checkpoint as well
        self.reach()
        return began[0]

    def reach(self) -> None:
        """Go on from where the checkpoint was saved, if the loop is there. Raises CheckpointError for parts that it
        lacks.
        """
        restored = self._parts.restored
        if self.is_replaying and restored:
            restored.reach()
            restored.give_again()
            with explaining_misfit(restored.name):
                generators = restored.state["generators"]
                restore_generators(generators, self._worker, seed=self._seed + self._restored_at)
        self.is_replaying = False

    def _samples_of_pass(self) -> int:
        return self.loader.epoch * self.loader.samples + self.loader.position if self.loader else 0
