"""Data sets of a few kilobytes, published on a server of the test, and processes that prepare them."""

import gzip
import hashlib
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from data_files import write_mnist

from raytorch.datasets.download import RemoteFile

PREPARE = """
import json, sys
from raytorch.config import MnistData
from raytorch.datasets import preparation
preparation.MNIST = tuple(preparation.RemoteFile(**remote) for remote in json.loads(sys.argv[2]))
preparation.prepare(MnistData(root=sys.argv[1]))
assert not {"torch", "torchvision", "ray"} & set(sys.modules)
"""


def small_mnist(folder: Path) -> dict[str, bytes]:
    """The four files of an MNIST of 7 + 3 images, as they would be published, by name."""
    raw = write_mnist(folder) / "MNIST" / "raw"
    return {f"{path.name}.gz": gzip.compress(path.read_bytes(), mtime=0) for path in raw.iterdir()}


def remotes(contents: dict[str, bytes], *mirrors: str) -> tuple[RemoteFile, ...]:
    return tuple(
        RemoteFile(name, len(content), hashlib.sha256(content).hexdigest(), mirrors)
        for name, content in contents.items()
    )


def preparing(root: Path, published: tuple[RemoteFile, ...]) -> subprocess.Popen[str]:
    """A process that prepares MNIST, which is ``published``, in ``root``."""
    wanted = json.dumps([asdict(remote) for remote in published])
    return subprocess.Popen([sys.executable, "-c", PREPARE, root, wanted], stderr=subprocess.PIPE, text=True)


def contents(root: Path) -> dict[str, bytes]:
    """What is in a folder, but for the file that is locked."""
    paths = (path for path in root.rglob("*") if path.is_file() and path.name != ".download.lock")
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}
