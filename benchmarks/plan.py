"""What is planned and what is taken: python benchmarks/plan.py [MODEL ...]

Of each model, one after the other and each in a process of its own: the bytes that ``raytorch plan`` tells of a worker
on a CPU, and by how much a process grows at its largest while it takes steps as the shipped loop does. What it had
before the model was made does not count, so that what PyTorch's own code takes is in neither: it has trained a tiny
model of the same kind before, and its largest size is looked at from then on.
"""

import argparse
import gc
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from raytorch.config import RunConfig
from raytorch.config.file import from_data
from raytorch.datasets import MicroBatch
from raytorch.distributed import Worker
from raytorch.models.networks import Architecture
from raytorch.models.objectives import loss_function
from raytorch.system.allocator import keep_freed_memory
from raytorch.system.memory import peak_resident, resident
from raytorch.training.averaging import WeightAverage
from raytorch.training.batch_loss import BatchLoss
from raytorch.training.optimizer_steps import OptimizerSteps
from raytorch.training.precision import Precision, choose_attention
from raytorch.training.preparing import prepare
from raytorch.training.rehearsal import rehearse

MB = 2**20
STEPS = 5
CPU = torch.device("cpu")
OWN = """
import torch
from torch import nn


class Unet(nn.Module):
    def __init__(self, input_shape, num_classes, *, width: int = 16):
        super().__init__()
        channels = [input_shape[0], width, 2 * width, 4 * width]
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(4, b), nn.GELU(), nn.Conv2d(b, b, 3, 2, 1))
            for a, b in zip(channels, channels[1:])
        )
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, max(a, 4), 4, 2, 1) for a, b in zip(channels, channels[1:]))
        self.head = nn.Linear(4, num_classes)

    def forward(self, x):
        seen = []
        for part in self.down:
            x = part(x)
            seen.append(x)
        for part in reversed(self.up):
            x = part(x + seen.pop() if seen and x.shape == seen[-1].shape else x).relu()
        return self.head(x.mean((2, 3)))
"""
IMAGES: dict[str, Any] = {"input_shape": (3, 32, 32), "num_classes": 10}
CIFAR = {"data": "cifar10"}
TOKENS = {"data": {"name": "tokens", "root": "/nowhere", "context": 256}}
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "mlp": (
        CIFAR | {"model": {"name": "mlp", "hidden": [6144, 6144, 6144]}, "batch_size": 256},
        {"model": {"name": "mlp", "hidden": [8]}},
        IMAGES,
    ),
    "gpt": (
        TOKENS | {"model": {"name": "gpt", "dim": 384, "heads": 6, "layers": 8}, "batch_size": 16, "clip_norm": 1.0},
        {"model": {"name": "gpt", "dim": 16, "heads": 2, "layers": 1}},
        {"vocabulary": 8192, "context": 256},
    ),
    "gpt, recomputed, averaged": (
        TOKENS
        | {
            "model": {"name": "gpt", "dim": 384, "heads": 6, "layers": 8, "checkpointing": ["blocks.*"]},
            "batch_size": 16,
            "accumulate": 4,
            "ema": {},
        },
        {"model": {"name": "gpt", "dim": 16, "heads": 2, "layers": 1}},
        {"vocabulary": 8192, "context": 256},
    ),
    "resnet18": (
        CIFAR | {"model": "resnet18", "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9}, "batch_size": 64},
        {"batch_size": 2},
        IMAGES,
    ),
    "convnet": (
        CIFAR | {"model": {"name": "convnet", "channels": [64, 128, 256]}, "batch_size": 512},
        {"batch_size": 2},
        IMAGES,
    ),
    "own": (
        CIFAR | {"model": {"name": "own.py:Unet", "width": 32}, "batch_size": 256},
        {"model": {"name": "own.py:Unet", "width": 4}, "batch_size": 2},
        IMAGES,
    ),
}
"""Of each model the run, what of it is changed for a tiny one, and the facts of its data."""


def batch_of(config: RunConfig, facts: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """A micro-batch of random numbers."""
    size = config.batch_size // config.accumulate
    if "context" in facts:
        tokens = torch.randint(facts["vocabulary"], (size, facts["context"]))
        return tokens, tokens.clone()
    return torch.randn(size, *facts["input_shape"]), torch.randint(facts["num_classes"], (size,))


def train(config: RunConfig, facts: dict[str, Any], content: Any) -> None:
    """Take steps as the shipped loop does."""
    precision = Precision.choose(config.precision, CPU)
    model = precision.to_memory_format(Architecture.of(config.model, facts, config.code).build())
    prepare(model, config.model)
    average = WeightAverage(model, config.ema) if config.ema else None
    steps = OptimizerSteps(config, model, precision, total_steps=STEPS, steps_per_epoch=STEPS)
    loss, batch_loss = loss_function(config.loss, model, config.code), BatchLoss(model, Worker(0, 1, CPU))
    samples = len(content[0])
    for _ in range(STEPS):
        steps.zero_grad()
        for _ in range(config.accumulate):
            with precision.autocast():
                value = loss(model, precision.layout_of(content))
            torch.autograd.backward(batch_loss.part(value, MicroBatch(content, samples, 1 / config.accumulate)))
        batch_loss.finish()
        steps.take()
        if average:
            average.update()


def measure(name: str) -> None:
    """Print what is planned of a model, and what it takes in this process."""
    run, tiny, facts = RUNS[name]
    config, small = (from_data({"epochs": 1, "precision": "fp32"} | each) for each in (run, run | tiny))
    torch.set_num_threads(1)
    choose_attention(CPU)
    keep_freed_memory()
    content = batch_of(config, facts)
    planned = rehearse(config, facts, content, "fp32", on_gpu=False)
    held = planned.heap - sum(each.nbytes for each in content)
    del planned
    train(small, facts, batch_of(small, facts))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the largest size is that of now
    before = resident() or 0
    train(config, facts, content)
    grown = (peak_resident() or 0) - before
    print(f"{name:<26}  {held / MB:>7,.0f}  {grown / MB:>8,.0f}  {held / grown:>7.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(RUNS))
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        measure(*given.models)
        return
    print(f"{'model':<26}  planned  measured  planned / measured, in MB")
    with TemporaryDirectory() as folder:
        (Path(folder) / "own.py").write_text(OWN, encoding="utf-8")
        for name in given.models or RUNS:
            command = [sys.executable, str(Path(__file__).resolve()), "--alone", name]
            subprocess.run(command, cwd=folder, check=True)


if __name__ == "__main__":
    main()
