"""The files of each data set: which they are, whether they are in order, and what they hold.

Uses numpy but no torch, so that the command line can :func:`check_dataset` a data set at once.
"""

import zlib
from pathlib import Path
from typing import Literal

import numpy as np

from raytorch.config import Cifar10Data, Data, DigitsData, MnistData, StoredData
from raytorch.datasets.cifar10_files import check_cifar10_batch, read_cifar10_batch
from raytorch.datasets.file_errors import Bytes, checked_labels, fault, reading
from raytorch.datasets.idx_files import IdxFormat, check_idx, read_idx
from raytorch.errors import DataError, Remedy

Split = Literal["train", "test"]

DIGITS = Path(__file__).with_name("digits.csv.gz")
"""Shipped with raytorch; digits.md beside it names the source and the licence."""
_SPLITS: tuple[Split, Split] = ("train", "test")


def check_dataset(config: Data) -> None:
    """Verify that the files of a data set are there, with the right headers and sizes, without loading them.

    Passes when files are missing that ``download`` would fetch. Raises DataError.
    """
    if isinstance(config, DigitsData):
        _check_digits()
    elif lacking := missing(config):
        if not config.download:
            raise _lacks(config, lacking[0])
    elif isinstance(config, Cifar10Data):
        for path in _cifar10_files(root_of(config)):
            check_cifar10_batch(path)
    else:
        for split in _SPLITS:
            _check_mnist(root_of(config), split)


def count(config: MnistData | Cifar10Data) -> dict[Split, int]:
    """Number of images in each split, all of which are read and verified for it. Raises DataError."""
    check_dataset(config)
    read = read_cifar10 if isinstance(config, Cifar10Data) else read_mnist
    return {split: len(read(root_of(config), split)[1]) for split in _SPLITS}


def missing(config: StoredData) -> list[Path]:
    """The files that the data set lacks in its root."""
    root = root_of(config)
    if isinstance(config, Cifar10Data):
        wanted = _cifar10_files(root)
    else:
        wanted = [path for split in _SPLITS for path in _mnist_files(root, split)]
    return [path for path in wanted if not _is_file(path)]


def root_of(config: StoredData) -> Path:
    """The folder of a data set, with ``~`` expanded. Raises DataError if that names no user."""
    try:
        return Path(config.root).expanduser()
    except RuntimeError as error:
        raise DataError(f"data.root: expected a folder, found {config.root} ({error}); name an existing one") from error


# -- reading -----------------------------------------------------------------------------------------------------------


def read_digits() -> tuple[Bytes, Bytes]:
    """Images (1797, 8, 8) with values 0..16 and labels (1797,), as scikit-learn's ``load_digits`` returns them."""
    _check_digits()
    with reading(DIGITS, "the digits that raytorch brings along", OSError, EOFError, zlib.error, ValueError):
        rows = np.loadtxt(DIGITS, delimiter=",", dtype=np.uint8).reshape(1797, 65)
        return rows[:, :-1].reshape(-1, 8, 8), rows[:, -1]


def read_mnist(root: Path, split: Split) -> tuple[Bytes, Bytes]:
    """Images (N, 28, 28) and labels (N,) of MNIST from ``root``/MNIST/raw, plain or .gz. Raises DataError."""
    _check_mnist(root, split)
    (image_file, label_file), (images, labels) = _mnist_files(root, split), _mnist_formats(split)
    return read_idx(image_file, images), checked_labels(label_file, read_idx(label_file, labels))


def read_cifar10(root: Path, split: Split) -> tuple[Bytes, Bytes]:
    """Images (N, 3, 32, 32) and labels (N,) of CIFAR-10 from ``root``, binary or python layout. Raises DataError."""
    files = _cifar10_files(root)
    batches = map(read_cifar10_batch, files[:-1] if split == "train" else files[-1:])
    images, labels = zip(*batches, strict=True)
    return np.concatenate(images), np.concatenate(labels)


# -- which files -------------------------------------------------------------------------------------------------------


def _check_digits() -> None:
    if not _is_file(DIGITS):
        raise DataError(f"{DIGITS}: expected the digits that raytorch brings along, found no file; reinstall raytorch")


def _mnist_formats(split: Split) -> tuple[IdxFormat, IdxFormat]:
    most = {"train": 60_000, "test": 10_000}[split]
    return IdxFormat("images", (28, 28), most), IdxFormat("labels", (), most)


def _mnist_files(root: Path, split: Split) -> tuple[Path, Path]:
    """The image file and the label file, each with .gz appended if only that is there."""

    def stored(name: str) -> Path:
        plain, zipped = (root / "MNIST" / "raw" / f"{name}{suffix}" for suffix in ("", ".gz"))
        return zipped if _is_file(zipped) and not _is_file(plain) else plain

    prefix = {"train": "train", "test": "t10k"}[split]
    return stored(f"{prefix}-images-idx3-ubyte"), stored(f"{prefix}-labels-idx1-ubyte")


def _check_mnist(root: Path, split: Split) -> None:
    (image_file, label_file), (images, labels) = _mnist_files(root, split), _mnist_formats(split)
    wanted, found = check_idx(image_file, images), check_idx(label_file, labels)
    if found != wanted:
        raise fault(label_file, f"{wanted:,} labels, one for each image of {image_file.name}", f"{found:,}")


def _cifar10_files(root: Path) -> list[Path]:
    """Five batches of training and one of test images, in the layout of which more is there."""
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    layouts = {"cifar-10-batches-bin": ".bin", "cifar-10-batches-py": ""}
    choices = [[root / folder / f"{name}{suffix}" for name in names] for folder, suffix in layouts.items()]
    return max(choices, key=lambda files: sum(map(_is_file, files)))


def _lacks(config: StoredData, path: Path) -> DataError:
    cifar10 = isinstance(config, Cifar10Data)
    expected = "a batch of CIFAR-10 (binary or python layout)" if cifar10 else "an IDX file of MNIST (plain or .gz)"
    found = "no readable file" if root_of(config).is_dir() else f"no folder {root_of(config)}"
    return DataError(
        f"{path}: expected {expected}, found {found}; put the data set's files there, or set data.download=true",
        remedies=[Remedy("prepare", str(root_of(config)), "cifar10" if cifar10 else "mnist")],
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False
