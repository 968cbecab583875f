"""Reading a data set of one's own: python benchmarks/own_data.py DATA [--runs 5]

DATA holds MNIST/raw/*-ubyte. The 60,000 images make shuffled, normalized batches of 128 in one process with one
thread: by the shipped data set and by an own one with ``batch(indices)``; and image by image with ``__getitem__``, by
PyTorch's DataLoader and by raytorch with as many readers, in turn. Prints medians and the ratios of each round.
"""

import argparse
import os
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from data_loading import rate
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader

from raytorch.config import MnistData
from raytorch.datasets import TrainLoader, load_dataset
from raytorch.datasets.files import read
from raytorch.datasets.own import OwnDataset

BATCH = 128
MEAN, DEVIATION = 0.1307, 0.3081


class Images:
    """MNIST as a user would hold it."""

    def __init__(self, root: str) -> None:
        images, labels = read(MnistData(root=root), "train")
        self.images, self.labels = torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels).long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return (self.images[index].float() / 255 - MEAN) / DEVIATION, self.labels[index]


class Batches(Images):
    """The same, a batch at a time, by the operations that the shipped data set takes."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.scale, self.offset = torch.tensor(1 / (255 * DEVIATION)), torch.tensor(-MEAN / DEVIATION)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        pixels = self.images.index_select(0, indices).float()
        return pixels.mul_(self.scale).add_(self.offset), self.labels.index_select(0, indices)


def endless(dataset: Any) -> Iterator[Any]:
    """The batches of a loader of raytorch's, epoch after epoch."""
    loader = TrainLoader(dataset, batch_size=BATCH)
    while True:
        yield from loader.remaining()
        loader.next_epoch()


def shuffled(images: Images, workers: int) -> Iterator[Any]:
    """Those of PyTorch's own."""
    loader = DataLoader(images, BATCH, shuffle=True, num_workers=workers)  # type: ignore[arg-type]
    while True:
        yield from loader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3, help="seconds per measurement")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    shipped, images, batches = (
        load_dataset(MnistData(root=options.data), "train"),
        *(kind(options.data) for kind in (Images, Batches)),
    )
    pairs = {
        "batch(indices) / shipped": (lambda: endless(shipped), lambda: endless(OwnDataset(batches, cpu))),
        **{
            f"__getitem__, {readers} readers / DataLoader": (
                lambda readers=readers: shuffled(images, readers),
                lambda readers=readers: endless(OwnDataset(images, cpu, readers=readers)),
            )
            for readers in (0, 1, 2)
        },
    }
    table = Table("batches/s", "beside", "own", "ratio", title=f"{options.runs} runs, {os.cpu_count()} cores")
    for name, (beside, own) in pairs.items():
        rates = [(rate(beside(), options.seconds), rate(own(), options.seconds)) for _ in range(options.runs)]
        theirs, ours = (statistics.median(column) for column in zip(*rates, strict=True))
        ratios = [mine / peer for peer, mine in rates]
        told = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        table.add_row(name, f"{theirs:,.0f}", f"{ours:,.0f}", told)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
