"""Making batches beside torchvision and DataLoader: python benchmarks/data_loading.py DATA [--runs 5]

DATA holds MNIST/raw/*-ubyte and CIFAR-10 in either layout. All make the same batches, of 128 shuffled and normalized
images, cropped with padding and for CIFAR-10 also flipped: torchvision's data sets and transforms in a DataLoader, and
raytorch, in turn, with one thread in one process and in two: two workers of the DataLoader, two ranks of raytorch, each
of which makes half of every batch. Prints medians and the ratios of each round.
"""

import argparse
import os
import statistics
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import multiprocessing
from torch.utils.data import DataLoader, RandomSampler
from torchvision import datasets, transforms

from raytorch.config import Augment, Cifar10Data, MnistData
from raytorch.datasets import TrainLoader, load_dataset
from raytorch.datasets.files import read

BATCH = 128
ENDLESS = 10**8
CIFAR10_MOMENTS = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
MNIST_MOMENTS = ((0.1307,), (0.3081,))


class Cifar10(datasets.CIFAR10):
    """torchvision's, but for reading either layout."""

    def __init__(self, root: str, transform: Any) -> None:
        images, labels = read(Cifar10Data(root=root), "train")
        self.data, self.targets = images.transpose(0, 2, 3, 1).copy(), labels.tolist()
        self.transform, self.target_transform = transform, None


def torchvision_batches(name: str, root: str, workers: int) -> Iterator[Any]:
    """Batches of the usual recipe, without end; ``workers``: processes beside this one."""
    if name == "cifar10":
        augment = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
        last = [transforms.ToTensor(), transforms.Normalize(*CIFAR10_MOMENTS)]
        dataset = Cifar10(root, transform=transforms.Compose([*augment, *last]))
    else:
        last = [transforms.ToTensor(), transforms.Normalize(*MNIST_MOMENTS)]
        dataset = datasets.MNIST(root, transform=transforms.Compose([transforms.RandomCrop(28, padding=2), *last]))
    sampler = RandomSampler(dataset, num_samples=ENDLESS)
    return iter(DataLoader(dataset, BATCH, sampler=sampler, num_workers=workers))


def raytorch_batches(name: str, root: str, rank: int, ranks: int) -> Iterator[Any]:
    """A rank's share of each batch, without end."""
    config = Cifar10Data(root=root) if name == "cifar10" else MnistData(root=root)
    augment = Augment(crop=4, flip=True) if name == "cifar10" else Augment(crop=2)
    loader = TrainLoader(load_dataset(config, "train"), batch_size=BATCH, rank=rank, world_size=ranks, augment=augment)
    while True:
        yield from loader.remaining()
        loader.next_epoch()


def rate(batches: Iterable[Any], seconds: float) -> float:
    """Batches per second, after the first eight, which the DataLoader's workers may have made beforehand."""
    stream = iter(batches)
    for _ in range(8):
        next(stream)
    count, begun = 0, time.perf_counter()
    while (passed := time.perf_counter() - begun) < seconds:
        next(stream)
        count += 1
    return count / passed


def rank_rate(name: str, root: str, rank: int, ranks: int, seconds: float, together: Any, rates: Any) -> None:
    """Put a rank's rate into the queue ``rates``, measured while the others' is."""
    torch.set_num_threads(1)
    batches = raytorch_batches(name, root, rank, ranks)
    next(batches)
    together.wait()
    rates.put(rate(batches, seconds))


def raytorch_rate(name: str, root: str, ranks: int, seconds: float) -> float:
    """Batches per second of the slowest rank."""
    context = multiprocessing.get_context("spawn")
    together, rates = context.Barrier(ranks), context.Queue()
    arguments = [(name, root, rank, ranks, seconds, together, rates) for rank in range(ranks)]
    processes = [context.Process(target=rank_rate, args=each) for each in arguments]
    for process in processes:
        process.start()
    slowest = min(rates.get() for _ in processes)
    for process in processes:
        process.join()
    return slowest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3, help="seconds per measurement")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(
        "batches/s", "DataLoader", "raytorch", "/ DataLoader", title=f"{options.runs} runs, {os.cpu_count()} cores"
    )
    for name in ("mnist", "cifar10"):
        for processes in (1, 2):
            theirs, ours = [], []
            for _ in range(options.runs):
                workers = 0 if processes == 1 else 2
                theirs.append(rate(torchvision_batches(name, options.data, workers), options.seconds))
                ours.append(raytorch_rate(name, options.data, processes, options.seconds))
            table.add_row(f"{name}, {processes} process{'es' if processes > 1 else ''}", *row(theirs, ours))
    Console(width=110).print(table)


def row(theirs: list[float], ours: list[float]) -> list[str]:
    """Medians, and the ratios of each round as median (least to most)."""
    ratios = [mine / peer for mine, peer in zip(ours, theirs, strict=True)]
    return [
        f"{statistics.median(theirs):,.0f}",
        f"{statistics.median(ours):,.0f}",
        f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})",
    ]


if __name__ == "__main__":
    main()
