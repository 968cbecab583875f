"""How long a checkpoint stops the training: python benchmarks/checkpoint_stall.py [--million 25] [--rounds 7]

Saves a model with AdamW, in one process on this machine's CPU, and prints of each of several rounds, in turn, the
seconds that a plain copy in memory takes of the same tensors, torch.save of them, and the training's wait for a
checkpoint of a run; then the steps that it takes per second while checkpoints are written without a pause, beside those
while none is.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from raytorch.config import Ranking
from raytorch.runs.storage import RunFolder
from raytorch.system.allocator import keep_freed_memory
from raytorch.training.checkpoints import Checkpoints
from raytorch.training.run_state import OptimizerState

MB = 2**20
BATCH = 64


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


class Training:
    """A model of so many million parameters, in layers of a million, and its optimizer."""

    def __init__(self, million: int) -> None:
        layers = [layer for _ in range(million) for layer in (nn.Linear(1024, 1024, bias=False), nn.ReLU())]
        self.model = nn.Sequential(*layers)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.batch = torch.randn(BATCH, 1024)

    def step(self) -> None:
        """One optimizer step."""
        self.optimizer.zero_grad()
        torch.autograd.backward(self.model(self.batch).square().mean())
        self.optimizer.step()

    @property
    def tensors(self) -> list[Tensor]:
        """The weights, and what the optimizer remembers."""
        remembered = [value for each in self.optimizer.state.values() for value in each.values()]
        return [parameter.detach() for parameter in self.model.parameters()] + remembered


class Saver:
    """Saves a training as a run does."""

    def __init__(self, training: Training, folder: Path) -> None:
        self._training, self._step = training, 0
        run = RunFolder(str(folder), "run")
        run.make()
        self._checkpoints = Checkpoints(run, 1, Ranking("loss", higher_is_better=False), lambda: None)

    def save(self) -> None:
        """Return when the training may go on."""
        self._step += 1
        state = {"kept": {"optimizer": OptimizerState(self._training.optimizer).state_dict()}}
        manifest = {"step": self._step, "metrics": {}, "evaluated": False}
        self._checkpoints.save({"model": (self._training.model, None)}, state, manifest)

    @property
    def is_busy(self) -> bool:
        """Whether it is still being written."""
        return self._checkpoints.is_busy

    def wait(self) -> None:
        """Return when it is written."""
        self._checkpoints.wait()


def copy_all(copies: list[Tensor], tensors: list[Tensor]) -> None:
    """A plain copy, into memory that is there."""
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor)


def stalls(training: Training, folder: Path, rounds: int) -> None:
    """Print the seconds of each way to save."""
    training.step()
    saver, copies = Saver(training, folder), [torch.empty_like(tensor) for tensor in training.tensors]
    nbytes = sum(tensor.nbytes for tensor in copies)
    taken: dict[str, list[float]] = {"plain copy": [], "torch.save": [], "checkpoint": [], "written": []}
    for number in range(rounds + 1):
        measured: dict[str, float] = {}
        for name, call in (
            ("plain copy", partial(copy_all, copies, training.tensors)),
            ("checkpoint", saver.save),
            ("written", saver.wait),
            ("torch.save", partial(torch.save, training.tensors, folder / "saved.pt")),
        ):
            if name != "written":
                training.step()  # so that each finds the memory as the training leaves it
            measured[name] = seconds(call)
        if number:  # the first round takes memory
            for name, value in measured.items():
                taken[name].append(value)
    print(f"{nbytes / MB:,.0f} MB of weights and optimizer; seconds of {rounds} rounds: median (least to most)")
    for name, each in taken.items():
        print(f"{name:<12} {statistics.median(each):.3f} ({min(each):.3f} to {max(each):.3f})")
    ratios = {
        of: [mine / other for mine, other in zip(taken["checkpoint"], taken[of], strict=True)]
        for of in ("plain copy", "torch.save")
    }
    for of, each in ratios.items():
        print(f"checkpoint / {of}: {statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})")


def speeds(training: Training, folder: Path, rounds: int) -> None:
    """Print the pace with and without checkpoints that are being written."""
    saver, each = Saver(training, folder / "speed"), 10
    ratios = []
    for _ in range(rounds):
        alone = seconds(lambda: [training.step() for _ in range(each)])
        saver.save()
        beside, steps = 0.0, 0
        while saver.is_busy or not steps:
            beside += seconds(training.step)
            steps += 1
        saver.wait()
        ratios.append(alone / each / (beside / steps))
        print(f"steps/s: {each / alone:.2f} alone, {steps / beside:.2f} while one is written ({steps} steps)")
    print(f"ratio: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--million", type=int, default=25, help="parameters of the model")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    keep_freed_memory()  # as a run does
    with tempfile.TemporaryDirectory() as folder:
        training = Training(given.million)
        stalls(training, Path(folder), given.rounds)
        speeds(training, Path(folder), given.rounds)


if __name__ == "__main__":
    main()
