"""Training beside what a user would run instead: python benchmarks/training.py DATA [--runs 5]

DATA holds MNIST/raw/*-ubyte. Runs torchrun with hand-written DDP, a plain Ray Train script, and raytorch with the same
net in float32 and in the precision that it chooses itself, in turn, and prints medians and the ratios of each round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
WORKERS = 2

Outcome = tuple[float, float]
"""Seconds from the command to the end of the first optimizer step, and samples per second over all workers after it."""


def peer(*command: str) -> Outcome:
    """Run a peer, which prints its outcome as JSON on its last line."""
    environment = {**os.environ, "T_START": str(time.time())}
    done = subprocess.run(command, cwd=HERE / "peers", env=environment, capture_output=True, text=True, check=True)
    outcome = json.loads(done.stdout.strip().splitlines()[-1])
    return outcome["first_step_s"], outcome["samples_per_s_per_worker"] * WORKERS


def raytorch(data: str, precision: str) -> Outcome:
    """Run raytorch on the same work."""
    with tempfile.TemporaryDirectory() as storage:
        begun = time.time()
        settings = {"data.root": data, "precision": precision, "storage": storage}
        overrides = [argument for key, value in settings.items() for argument in ("--set", f"{key}={value}")]
        command = [BIN / "raytorch", "train", HERE / "training.yaml", "--json", *overrides]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    summary = json.loads(done.stdout)
    return summary["first_step_at"] - begun, summary["samples_per_s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    data = str(Path(options.data).resolve())
    contestants: dict[str, Callable[[], Outcome]] = {
        "torchrun": lambda: peer(str(BIN / "torchrun"), f"--nproc_per_node={WORKERS}", "torchrun_ddp.py", data),
        "Ray Train script": lambda: peer(sys.executable, "bare_ray_train.py", data),
        "raytorch, fp32": lambda: raytorch(data, "fp32"),
        "raytorch, auto": lambda: raytorch(data, "auto"),
    }
    outcomes: dict[str, list[Outcome]] = {name: [] for name in contestants}
    for _ in range(options.runs):
        for name, run in contestants.items():
            outcomes[name].append(run())
    report(outcomes)


def report(outcomes: dict[str, list[Outcome]]) -> None:
    """Print a row per contestant: medians, and the ratios of each round to a peer, as median (least to most)."""
    runs = len(outcomes["torchrun"])
    table = Table(
        "",
        "first step, s",
        "/ Ray Train script",
        "samples/s",
        "/ torchrun",
        title=f"{runs} runs, {os.cpu_count()} cores",
    )
    for name, rows in outcomes.items():
        first, rate = (statistics.median(column) for column in zip(*rows, strict=True))
        sooner = [row[0] / base[0] for row, base in zip(rows, outcomes["Ray Train script"], strict=True)]
        faster = [row[1] / base[1] for row, base in zip(rows, outcomes["torchrun"], strict=True)]
        table.add_row(name, f"{first:.1f}", _ratio(sooner), f"{rate:,.0f}", _ratio(faster))
    Console(width=110).print(table)


def _ratio(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


if __name__ == "__main__":
    main()
