"""What frequent checkpoints cost: python benchmarks/checkpoints.py [--runs 3]

Trains the same small run with a checkpoint every 20 optimizer steps and every 500, in turn, and prints of each the
median samples per second while it trains, and over all of its time but that before the first step.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
STEPS, BATCH = 3_000, 64


def rates(every_steps: int) -> tuple[float, float]:
    """Samples per second of a run: while it trained, and with its checkpoints."""
    with tempfile.TemporaryDirectory() as storage:
        settings = {
            "epochs": "null",
            "steps": STEPS,
            "batch_size": BATCH,
            "checkpoint": f"{{every_steps: {every_steps}, every_epochs: null}}",
            "scaling.workers": 2,
            "logging.tensorboard": "false",
            "storage": storage,
        }
        overrides = [argument for key, value in settings.items() for argument in ("--set", f"{key}={value}")]
        command = [Path(sys.executable).parent / "raytorch", "train", HERE.parent / "configs/digits_mlp.yaml", "--json"]
        done = subprocess.run([*command, *overrides], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    summary = json.loads(done.stdout)
    seconds = summary["seconds"]
    busy = seconds["training"] + seconds["data"] + seconds["checkpointing"]
    return summary["samples_per_s"], STEPS * BATCH / busy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args().runs
    outcomes: dict[int, list[tuple[float, float]]] = {20: [], 500: []}
    for _ in range(runs):
        for every, found in outcomes.items():
            found.append(rates(every))
    for every, found in outcomes.items():
        training, overall = (statistics.median(column) for column in zip(*found, strict=True))
        print(f"every {every:>3} steps: {training:>8,.0f} samples/s, {overall:>8,.0f} with the time of checkpoints")


if __name__ == "__main__":
    main()
