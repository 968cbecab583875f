"""Bring a data set's files into its folder: download, verify, unpack. Imports no torch."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raytorch.config import StoredData
from raytorch.datasets import files
from raytorch.datasets.archives import inflate, unpack
from raytorch.datasets.download import DownloadCallback, RemoteFile, fetch
from raytorch.datasets.file_errors import fault
from raytorch.errors import DataError
from raytorch.system.regular_files import open_regular

# Mirrors that PyTorch and Google (MNIST), the data set's author and PaddlePaddle (CIFAR-10) keep. The bytes are those
# of the MD5 sums in torchvision; SHA-256, as anyone can make two files of one MD5 sum.
_MNIST_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
_MNIST_FILES = (
    ("train-images-idx3-ubyte.gz", 9_912_422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
    ("train-labels-idx1-ubyte.gz", 28_881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
    ("t10k-images-idx3-ubyte.gz", 1_648_877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
    ("t10k-labels-idx1-ubyte.gz", 4_542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
)
MNIST = tuple(RemoteFile(*file, _MNIST_MIRRORS) for file in _MNIST_FILES)
CIFAR10 = RemoteFile(
    "cifar-10-python.tar.gz",
    170_498_071,
    "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    ("https://www.cs.toronto.edu/~kriz/", "https://dataset.bj.bcebos.com/cifar/"),
)

_CIFAR10_FOLDER = "cifar-10-batches-py"
_MOST_BYTES = 2**28


def prepare(config: StoredData, watch: DownloadCallback = lambda name, there, size: None) -> None:
    """Download what the data set lacks in its root, whether or not ``config.download`` says so. Raises DataError.

    Any number of processes may call this at once: one downloads, the others wait for it. Files are complete when they
    get their names; what a killed download leaves is in ``.download``, where the next one goes on with it.
    """
    root = files.root_of(config)
    if not files.missing(config):
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root):
            _bring(config, root, watch)
    except OSError as error:
        reason = " ".join(str(error).split())
        names = ", ".join(remote.name for remote in _lacking(config))
        raise DataError(
            f"{root}: could not download the data set ({reason}); on a machine without network, put {names} into "
            f"{root} and prepare it again"
        ) from error


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    with os.fdopen(open_regular(root / ".download.lock", os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW), "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _bring(config: StoredData, root: Path, watch: DownloadCallback) -> None:
    staging = root / ".download"
    for remote in _lacking(config):  # nothing, if another process has brought it while this one waited
        staging.mkdir(exist_ok=True)
        archive = _archive(remote, root, staging, watch)
        plain = staging / archive.stem
        inflate(archive, plain, _MOST_BYTES)
        if remote is CIFAR10:
            _place(unpack(plain, _CIFAR10_FOLDER, staging), root / _CIFAR10_FOLDER)
        else:
            _place([plain], root / "MNIST" / "raw")
    shutil.rmtree(staging, ignore_errors=True)


def _lacking(config: StoredData) -> list[RemoteFile]:
    missing = files.missing(config)
    if files.FILES[config.name].download == "cifar10":
        return [CIFAR10] if missing else []
    names = {path.name for path in missing}
    return [remote for remote in MNIST if remote.name.removesuffix(".gz") in names]


def _archive(remote: RemoteFile, root: Path, staging: Path, watch: DownloadCallback) -> Path:
    """The file as it is published: put into the root by hand, or downloaded."""
    path = root / remote.name
    if path.exists():
        if not remote.is_in(path):
            raise fault(path, f"the published file, {remote.size:,} bytes of SHA-256 {remote.sha256}", "another")
    else:
        path = staging / remote.name
        fetch(remote, path, watch)
    return path


def _place(paths: list[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        path.replace(folder / path.name)
