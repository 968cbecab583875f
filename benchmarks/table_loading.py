"""Batches of tables and arrays in files: python benchmarks/table_loading.py [--rows 1000000] [--runs 3]

Shuffled batches of 128 rows of 16 float32 columns and a class, in one process with one thread: from files by raytorch,
and from tensors in memory by PyTorch's DataLoader, in turn. Prints medians and the ratios of each round.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from data_loading import rate, row
from pyarrow import feather, parquet
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset

from raytorch.config.file import from_data
from raytorch.datasets import TrainLoader, load_splits
from raytorch.datasets.sampling import blocks_of

BATCH, COLUMNS, BLOCK = 128, 16, 65_536


def write(folder: Path, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same rows in every format."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((rows, COLUMNS), dtype=np.float32)
    classes = rng.integers(0, 10, rows)
    np.savez(folder / "rows.npz", x=features, y=classes)
    table = pa.table({**{f"x{number}": features[:, number] for number in range(COLUMNS)}, "target": classes})
    parquet.write_table(table, folder / "rows.parquet", row_group_size=BLOCK)
    feather.write_feather(table, folder / "rows.arrow", compression="uncompressed", chunksize=BLOCK)
    return torch.from_numpy(features), torch.from_numpy(classes)


def from_files(folder: Path, name: str, shuffle: str) -> Iterator[Any]:
    """The batches of a loader of raytorch's, epoch after epoch."""
    section = {"name": "arrays" if name.endswith("npz") else "table", "root": str(folder), "train": name, "test": 0.01}
    train = load_splits(from_data({"epochs": 1, "data": section}), torch.device("cpu")).train
    loader = TrainLoader(train, batch_size=BATCH, blocks=blocks_of(train) if shuffle == "blocks" else None)
    while True:
        yield from loader.remaining()
        loader.next_epoch()


def from_memory(features: torch.Tensor, classes: torch.Tensor) -> Iterator[Any]:
    """Those of PyTorch's own."""
    loader = DataLoader(TensorDataset(features, classes), BATCH, shuffle=True)
    while True:
        yield from loader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3, help="seconds per measurement")
    options = parser.parse_args()
    torch.set_num_threads(1)
    title = f"{options.rows:,} rows, {options.runs} runs, {os.cpu_count()} cores"
    shown = Table("batches/s", "DataLoader", "raytorch", "/ DataLoader", title=title)
    with tempfile.TemporaryDirectory(prefix="raytorch-table-") as name:
        folder = Path(name)
        tensors = write(folder, options.rows)
        for file, shuffle in (
            ("rows.npz", "full"),
            ("rows.arrow", "full"),
            ("rows.arrow", "blocks"),
            ("rows.parquet", "blocks"),
        ):
            rates = [
                (
                    rate(from_memory(*tensors), options.seconds),
                    rate(from_files(folder, file, shuffle), options.seconds),
                )
                for _ in range(options.runs)
            ]
            shown.add_row(f"{file}, {shuffle}", *row(*map(list, zip(*rates, strict=True))))
    Console(width=110).print(shown)


if __name__ == "__main__":
    main()
