"""Killing workers of a run at random, and what has to hold of its checkpoints then."""

import os
import re
import signal
from pathlib import Path
from random import Random
from threading import Event, Thread
from typing import Any, NamedTuple

from raytorch.runs.checkpoint_manifest import checkpoint_names, checkpoint_step, is_complete_checkpoint
from raytorch.runs.storage import RunFolder

EVERY, KEEP = 20, 2
STEPS_PER_KILL = 60
STEP_FILE = "step.txt"


def often_saved(kills: int) -> dict[str, Any]:
    """What to change in a small run, so that it is long enough for so many kills and saves often."""
    return {
        "epochs": None,
        "steps": STEPS_PER_KILL * (kills + 1),
        "checkpoint": {"every_steps": EVERY, "every_epochs": None, "keep": KEEP},
        "failure": {"max_restarts": -1},
    }


def tell_steps() -> None:
    """Have rank 0 of a training in this process write down the number of each optimizer step when it is done."""
    from raytorch.training.loop import Trainer

    train_step = Trainer.train_step

    def step_told(run: Any, micro_batches: Any) -> None:
        train_step(run, micro_batches)
        if run.run.worker.rank == 0:
            if not hasattr(run, "told"):
                run.told = os.open(
                    RunFolder(run.config.storage, run.config.name).file(STEP_FILE), os.O_WRONLY | os.O_CREAT
                )
            os.pwrite(run.told, b"%8d" % run.run.step, 0)

    Trainer.train_step = step_told  # type: ignore[method-assign]


class Kill(NamedTuple):
    """One of the kills, and what there was when it came."""

    step: int
    """Steps that were done."""
    complete: list[int]
    """The steps of the complete checkpoints, at least these."""


class Killer:
    """Kills a worker, of random rank after random steps, again and again, and keeps watch on the run's folder.

    Attributes:
        pids: The processes of the two ranks; none is killed that has the pid of one that was.
        kills: What was done so far.
        most: Checkpoints, with those that are being saved, that were on the disk at most.
    """

    def __init__(self, folder: RunFolder, kills: int) -> None:
        self.pids: dict[int, int] = {}
        self.kills: list[Kill] = []
        self.most = 0
        self._folder, self._random = folder, Random()
        steps = (self._random.randrange(EVERY, STEPS_PER_KILL) for _ in range(kills))
        self._targets = [STEPS_PER_KILL * number + step for number, step in enumerate(steps)]
        self._killed: set[int] = set()
        self._ended = Event()
        self._thread = Thread(target=self._lurk)

    def __enter__(self) -> "Killer":
        Path(self._folder.path).mkdir(parents=True)
        Path(self._folder.file(STEP_FILE)).write_text(f"{0:8d}", encoding="utf-8")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def check(self) -> None:
        """What was lost, and what was on the disk, as the run's folder tells when it has ended."""
        assert len(self.kills) == len(self._targets)
        log = Path(self._folder.file("logs/rank-0.log")).read_text(encoding="utf-8")
        resumed = [int(step) for step in re.findall(r"resumed from \S+ at step (\d+)", log)]
        for kill, step in zip(self.kills, [0] * (len(self.kills) - len(resumed)) + resumed, strict=True):
            print(
                f"killed after step {kill.step}, complete {kill.complete}, went on from {step}, {kill.step - step} lost"
            )
            assert step >= (kill.complete[-2] if len(kill.complete) > 1 else 0)
        print(f"{self.most} checkpoints on the disk at most")
        assert self.most <= KEEP + 2

    def _lurk(self) -> None:
        while not self._ended.wait(0.002):
            names = self._folder.folders()
            self.most = max(self.most, len([name for name in names if name.startswith(("checkpoint_", ".saving-"))]))
            pids = dict(self.pids)
            if len(pids) < 2 or self._killed & set(pids.values()) or len(self.kills) == len(self._targets):
                continue
            if self._step() >= self._targets[len(self.kills)]:
                complete = [
                    name for name in checkpoint_names(self._folder) if is_complete_checkpoint(self._folder, name)
                ]
                os.kill(pids[self._random.randrange(2)], signal.SIGKILL)
                self._killed |= set(pids.values())
                self.kills.append(Kill(self._step(), [checkpoint_step(name) for name in complete]))

    def _step(self) -> int:
        return int(Path(self._folder.file(STEP_FILE)).read_text(encoding="utf-8") or 0)
