"""Reading images from files: python benchmarks/images.py CIFAR10.npz [--runs 5] [--readers 0 1 2]

CIFAR10.npz holds CIFAR-10's images as JPEG, ``train_bytes``, ``train_sizes`` and ``train_labels``. 5,000 of them are
scaled to 256 pixels and written into a folder for each class. Random parts of them, resized to 224 pixels and half of
them mirrored, make shuffled, normalized batches of 32: by torchvision's ImageFolder and transforms in PyTorch's
DataLoader, and by ``data: images``, with as many processes, in turn; and by that again in the epochs after the first,
with ``cache: memory``. Each process has one thread. Prints medians and the ratios of each round; before that it holds
against each other all batches of an epoch that 0 readers and others make, with and without the cache, bit for bit.
"""

import argparse
import hashlib
import io
import itertools
import os
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data_loading import rate
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from raytorch.config.file import from_data
from raytorch.datasets import TrainLoader, load_split
from raytorch.system.allocator import keep_freed_memory

BATCH, SIDE, SIZE, AREAS = 32, 256, 224, [0.08, 1.0]
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def make(archive: str, folder: Path, images: int) -> None:
    """Write the JPEGs."""
    content = np.load(archive)
    ends = np.cumsum(content["train_sizes"][:images].astype(np.int64))
    encoded = content["train_bytes"][: ends[-1]].tobytes()
    for number, (start, end, label) in enumerate(zip([0, *ends], ends, content["train_labels"], strict=False)):
        place = folder / "train" / str(label) / f"{number:05}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        image = Image.open(io.BytesIO(encoded[start:end])).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        image.save(place, quality=90)


def image_folder(folder: Path, processes: int) -> Iterator[Any]:
    """Batches of torchvision's."""
    changes = [transforms.RandomResizedCrop(SIZE, tuple(AREAS)), transforms.RandomHorizontalFlip()]
    transform = transforms.Compose([*changes, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    data = datasets.ImageFolder(str(folder / "train"), transform)
    loader = DataLoader(data, BATCH, shuffle=True, num_workers=processes, persistent_workers=processes > 0)
    while True:
        yield from loader


def raytorch_loader(folder: Path, readers: int, cache: str) -> TrainLoader:
    """That of ``data: images``."""
    augment = {"resized_crop": AREAS, "flip": True}
    section = {"name": "images", "root": str(folder), "size": SIZE, "augment": augment}
    config = from_data({"epochs": 1, "data": section | {"readers": readers, "cache": cache}})
    return TrainLoader(load_split(config, "train", torch.device("cpu"), training=True), batch_size=BATCH)


def epoch(loader: TrainLoader) -> Iterator[Any]:
    """The batches of the next epoch."""
    for [batch] in loader.remaining():
        yield batch.content
    loader.next_epoch()


def endless(loader: TrainLoader) -> Iterator[Any]:
    """The batches of one epoch after the other."""
    while True:
        yield from epoch(loader)


def digest(batches: Iterator[Any]) -> str:
    """A checksum of batches."""
    total = hashlib.blake2b()
    for images, labels in batches:
        total.update(np.ascontiguousarray(images.numpy()))
        total.update(labels.numpy())
    return total.hexdigest()


def require_same(folder: Path, readers: list[int]) -> int:
    """Hold the batches of an epoch against each other, and return how many there are."""
    kinds = list(itertools.product(readers, ["none", "memory"]))
    found = {}
    for count, cache in kinds:
        loader = raytorch_loader(folder, count, cache)
        found[count, cache] = digest(epoch(loader)), digest(epoch(loader))
    assert len(set(found.values())) == 1, found
    return 2 * loader.steps_per_epoch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--readers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=4, help="seconds per measurement")
    parser.add_argument("--images", type=int, default=5_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as workers do
    table = Table("images/s", "ImageFolder", "images", "ratio", "cached", "ratio")
    table.title = f"{options.runs} runs, {os.cpu_count()} cores"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(options.archive, folder, options.images)
        same = require_same(folder, options.readers)
        for readers in options.readers:
            theirs = image_folder(folder, readers)
            ours = endless(raytorch_loader(folder, readers, "none"))
            loader = raytorch_loader(folder, readers, "memory")
            for _ in epoch(loader):
                pass
            sources = (theirs, ours, endless(loader))
            rates = [[BATCH * rate(each, options.seconds) for each in sources] for _ in range(options.runs)]
            columns = [statistics.median(column) for column in zip(*rates, strict=True)]
            cells = [f"{columns[0]:,.0f}"]
            for number in (1, 2):
                ratios = [row[number] / row[0] for row in rates]
                told = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
                cells += [f"{columns[number]:,.0f}", told]
            table.add_row(f"{readers} readers", *cells)
    console = Console(width=110)
    console.print(f"{same:,} batches are the same for all readers, cached or not")
    console.print(table)


if __name__ == "__main__":
    main()
