"""The files of each data set: which they are, whether they are in order, and what they hold.

Uses numpy but no torch, so that the command line can :func:`check_dataset` a data set at once.
"""

import zlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from raytorch.config import Cifar10Data, Data, ImageData, MnistData, StoredData
from raytorch.datasets.cifar10_files import check_cifar10_batch, read_cifar10_batch
from raytorch.datasets.file_errors import Bytes, checked_labels, fault, reading
from raytorch.datasets.idx_files import IdxFormat, check_idx, read_idx
from raytorch.errors import DataError, Remedy

Split = Literal["train", "test"]

DIGITS = Path(__file__).with_name("digits.csv.gz")
"""Shipped with raytorch; digits.md beside it names the source and the licence."""
_DIGITS_TEST = 297
_SPLITS: tuple[Split, Split] = ("train", "test")


class DataFiles(ABC):
    """The files that data sets are made of, in a folder, the root. Methods raise DataError for what is not in order."""

    one: ClassVar[str]
    """What one of them is, for a message."""
    download: ClassVar[Literal["mnist", "cifar10"] | None] = None
    """The name by which they are downloaded; None of what raytorch brings along."""

    @abstractmethod
    def paths(self, root: Path) -> list[Path]:
        """All that have to be there."""

    @abstractmethod
    def check(self, root: Path) -> None:
        """Verify headers and sizes."""

    @abstractmethod
    def read(self, root: Path, split: Split) -> tuple[Bytes, Bytes]:
        """Images (N, H, W) or (N, C, H, W), and labels (N,)."""


def check_dataset(config: Data) -> None:
    """Verify that the files of a data set are there, with the right headers and sizes, without loading them.

    Passes when files are missing that ``download`` would fetch. Raises DataError.
    """
    if lacking := missing(config):
        if not (isinstance(config, StoredData) and config.download):
            raise _lacks(config, lacking[0])
    else:
        FILES[config.name].check(root_of(config))


def count(config: MnistData | Cifar10Data) -> dict[Split, int]:
    """Number of images in each split, all of which are read and verified for it. Raises DataError."""
    check_dataset(config)
    return {split: len(read(config, split)[1]) for split in _SPLITS}


def missing(config: ImageData) -> list[Path]:
    """The files that the data set lacks in its root."""
    return [path for path in FILES[config.name].paths(root_of(config)) if not _is_file(path)]


def read(config: ImageData, split: Split) -> tuple[Bytes, Bytes]:
    """What the files of a data set hold: see :meth:`DataFiles.read`. Raises DataError."""
    return FILES[config.name].read(root_of(config), split)


def root_of(config: ImageData) -> Path:
    """The folder of a data set, with ``~`` expanded. Raises DataError if that names no user."""
    if not isinstance(config, StoredData):
        return DIGITS.parent
    try:
        return Path(config.root).expanduser()
    except RuntimeError as error:
        raise DataError(f"data.root: expected a folder, found {config.root} ({error}); name an existing one") from error


def _lacks(config: ImageData, path: Path) -> DataError:
    files, root = FILES[config.name], root_of(config)
    if files.download is None:
        return DataError(f"{path}: expected {files.one}, found no file; reinstall raytorch")
    found = "no readable file" if root.is_dir() else f"no folder {root}"
    return DataError(
        f"{path}: expected {files.one}, found {found}; put the data set's files there, or set data.download=true",
        remedies=[Remedy("prepare", str(root), files.download)],
    )


# -- which they are, and what they hold --------------------------------------------------------------------------------


class DigitsFiles(DataFiles):
    """The digits that raytorch brings along."""

    one = "the digits that raytorch brings along"

    def paths(self, root: Path) -> list[Path]:
        return [root / DIGITS.name]

    def check(self, root: Path) -> None:
        """There is nothing to verify without reading all of it."""

    def read(self, root: Path, split: Split) -> tuple[Bytes, Bytes]:
        """Images (N, 8, 8) with values 0..16 and labels (N,), of those that scikit-learn's ``load_digits`` returns."""
        images, labels = self.read_all(root)
        # RandomState, as its numbers are the only ones that numpy promises never to change.
        order = np.random.RandomState(0).permutation(len(labels))
        chosen = order[:-_DIGITS_TEST] if split == "train" else order[-_DIGITS_TEST:]
        return images[chosen], labels[chosen]

    def read_all(self, root: Path) -> tuple[Bytes, Bytes]:
        """Images (1797, 8, 8) and labels (1797,)."""
        with reading(DIGITS, self.one, OSError, EOFError, zlib.error, ValueError):
            rows = np.loadtxt(root / DIGITS.name, delimiter=",", dtype=np.uint8).reshape(1797, 65)
            return rows[:, :-1].reshape(-1, 8, 8), rows[:, -1]


class MnistFiles(DataFiles):
    """MNIST in ``MNIST/raw``, each of its four files plain or .gz."""

    one = "an IDX file of MNIST (plain or .gz)"
    download = "mnist"

    def paths(self, root: Path) -> list[Path]:
        return [path for split in _SPLITS for path in self._paths(root, split)]

    def check(self, root: Path) -> None:
        for split in _SPLITS:
            self._check(root, split)

    def read(self, root: Path, split: Split) -> tuple[Bytes, Bytes]:
        """Images (N, 28, 28) and labels (N,)."""
        self._check(root, split)
        (image_file, label_file), (images, labels) = self._paths(root, split), _mnist_formats(split)
        return read_idx(image_file, images), checked_labels(label_file, read_idx(label_file, labels))

    def _check(self, root: Path, split: Split) -> None:
        (image_file, label_file), (images, labels) = self._paths(root, split), _mnist_formats(split)
        wanted, found = check_idx(image_file, images), check_idx(label_file, labels)
        if found != wanted:
            raise fault(label_file, f"{wanted:,} labels, one for each image of {image_file.name}", f"{found:,}")

    def _paths(self, root: Path, split: Split) -> tuple[Path, Path]:
        """The image file and the label file, each with .gz appended if only that is there."""

        def stored(name: str) -> Path:
            plain, zipped = (root / "MNIST" / "raw" / f"{name}{suffix}" for suffix in ("", ".gz"))
            return zipped if _is_file(zipped) and not _is_file(plain) else plain

        prefix = {"train": "train", "test": "t10k"}[split]
        return stored(f"{prefix}-images-idx3-ubyte"), stored(f"{prefix}-labels-idx1-ubyte")


class Cifar10Files(DataFiles):
    """CIFAR-10 as six batches, in the binary or the python layout."""

    one = "a batch of CIFAR-10 (binary or python layout)"
    download = "cifar10"

    def paths(self, root: Path) -> list[Path]:
        """Five batches of training and one of test images, in the layout of which more is there."""
        names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
        layouts = {"cifar-10-batches-bin": ".bin", "cifar-10-batches-py": ""}
        choices = [[root / folder / f"{name}{suffix}" for name in names] for folder, suffix in layouts.items()]
        return max(choices, key=lambda files: sum(map(_is_file, files)))

    def check(self, root: Path) -> None:
        for path in self.paths(root):
            check_cifar10_batch(path)

    def read(self, root: Path, split: Split) -> tuple[Bytes, Bytes]:
        """Images (N, 3, 32, 32) and labels (N,)."""
        files = self.paths(root)
        batches = map(read_cifar10_batch, files[:-1] if split == "train" else files[-1:])
        images, labels = zip(*batches, strict=True)
        return np.concatenate(images), np.concatenate(labels)


_MNIST = MnistFiles()
FILES: dict[str, DataFiles] = {
    "digits": DigitsFiles(),
    "mnist": _MNIST,
    "moving_mnist": _MNIST,
    "mnist_strips": _MNIST,
    "cifar10": Cifar10Files(),
}
"""The files of each data set by its name in a configuration."""


def _mnist_formats(split: Split) -> tuple[IdxFormat, IdxFormat]:
    most = {"train": 60_000, "test": 10_000}[split]
    return IdxFormat("images", (28, 28), most), IdxFormat("labels", (), most)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False
