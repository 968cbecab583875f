"""Writing the files of data sets, right ones and, from these, wrong ones."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from raytorch.errors import DataError

ROWS, PIXELS = 10_000, 3072


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def images(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 28, 28), np.uint8)


def store(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return path


def refused(path: Path, read, *arguments) -> str:
    """The message of the one error that reading ``path`` raises, which has to help."""
    with pytest.raises(DataError) as caught:
        read(path, *arguments)
    message = str(caught.value)
    assert message.startswith(f"{path}: expected ")
    assert ", found " in message
    assert "data.download=true" in message
    assert "\n" not in message
    return message


def write_mnist(root: Path, suffix: str = "", train: int = 7, test: int = 3) -> Path:
    for prefix, count in (("train", train), ("t10k", test)):
        store(root / "MNIST" / "raw" / f"{prefix}-images-idx3-ubyte{suffix}", idx(images(count)))
        labels = np.arange(count, dtype=np.uint8) % 10
        store(root / "MNIST" / "raw" / f"{prefix}-labels-idx1-ubyte{suffix}", idx(labels))
    return root


def binary(pixels: np.ndarray, labels: np.ndarray) -> bytes:
    return np.concatenate([labels[:, None], pixels], axis=1).tobytes()


def python2_pickle(pixels: np.ndarray, labels: np.ndarray) -> bytes:
    """The bytes that Python 2 and its numpy wrote: protocol 2, text as BINSTRING, the array by _reconstruct."""
    listed = b"".join(b"K" + bytes([label]) for label in labels)
    return (
        b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x15training batch 1 of 5q\x03U\x06labelsq\x04]q\x05(" + listed + b"e"
        b"U\x04dataq\x06cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85U\x01b\x87Rq\x09"
        b"(K\x01M\x10\x27M\x00\x0c\x86cnumpy\ndtype\nq\x0aU\x02u1K\x00K\x01\x87Rq\x0b"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"T" + struct.pack("<i", pixels.size) + pixels.tobytes() + b"tbu."
    )
