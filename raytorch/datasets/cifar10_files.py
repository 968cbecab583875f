"""Parse batches of CIFAR-10, pickles among them, trusting nothing that a file says about itself; numpy only."""

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np

from raytorch.datasets.file_errors import Bytes, checked_labels, fault, reading

_ROWS = 10_000
_PIXELS = 3 * 32 * 32
_BINARY_BYTES = _ROWS * (1 + _PIXELS)
# The pixels, and at most 128 bytes per row for its label and file name; the original pickles use 32.
_PYTHON_BYTES = range(_ROWS * _PIXELS, _ROWS * (_PIXELS + 128))
# What a row adds to a pickle: its label and its file name, each memorized at most. The rest is a few dozen operations.
_PER_ROW = frozenset(
    ["BININT1", "BININT", "SHORT_BINSTRING", "SHORT_BINUNICODE", "BINUNICODE", "BINPUT", "LONG_BINPUT", "MEMOIZE"]
)
_MOST_PER_ROW = 4 * _ROWS
_MOST_OTHERS = 500


def check_cifar10_batch(path: Path) -> None:
    """Verify the size of a batch of CIFAR-10 and, of a pickle, that it ends as one. Raises DataError."""
    with reading(path, "a batch of CIFAR-10", OSError), path.open("rb") as stream:
        size = stream.seek(0, io.SEEK_END)
        stream.seek(max(size - 1, 0))
        last = stream.read(1)
    if path.suffix == ".bin":
        if size != _BINARY_BYTES:
            raise fault(path, f"{_BINARY_BYTES:,} bytes", f"{size:,}")
    elif size not in _PYTHON_BYTES:
        raise fault(path, f"{_PYTHON_BYTES.start:,} to {_PYTHON_BYTES.stop:,} bytes", f"{size:,}")
    elif last != pickle.STOP:
        raise fault(path, "a pickle, which ends in a full stop", f"{last!r}")


def read_cifar10_batch(path: Path) -> tuple[Bytes, Bytes]:
    """Images (10000, 3, 32, 32) and labels (10000,) of a batch: binary if its name ends in .bin, else a pickle.

    Nothing that a pickle names is imported or called. Raises DataError.
    """
    check_cifar10_batch(path)
    images, labels = (_read_binary_batch if path.suffix == ".bin" else _read_python_batch)(path)
    return images.reshape(-1, 3, 32, 32), checked_labels(path, labels)


def _read_binary_batch(path: Path) -> tuple[Bytes, Bytes]:
    with reading(path, f"{_ROWS:,} rows of a label and an image", OSError, ValueError):
        rows = np.fromfile(path, np.uint8, count=_BINARY_BYTES).reshape(_ROWS, 1 + _PIXELS)
    return rows[:, 1:], rows[:, 0]


def _read_python_batch(path: Path) -> tuple[Bytes, Bytes]:
    with reading(path, f"a pickled dictionary with data and labels of {_ROWS:,} images", Exception):
        content = path.read_bytes()
        _require_few_operations(content)
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
        fields = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
        _, shape, dtype, columns_first, pixels = fields["data"].state
        labels = fields["labels"]
        if shape != (_ROWS, _PIXELS) or dtype.arguments[0] not in ("u1", b"u1"):
            raise ValueError(f"data of shape {shape} and type {dtype.arguments[0]}")
        if len(labels) != _ROWS or any(type(label) is not int for label in labels):
            raise ValueError(f"{len(labels):,} labels that are not all integers")
        images = np.frombuffer(pixels, np.uint8).reshape(shape, order="F" if columns_first else "C")
        return images, np.array(labels, np.uint8)


def _require_few_operations(content: bytes) -> None:
    """Refuse a pickle that would fill the memory with small objects, or nest them until Python's stack overflows."""
    per_row = others = 0
    for operation, _, _ in pickletools.genops(content):
        if operation.name in _PER_ROW:
            per_row += 1
        else:
            others += 1
        if per_row > _MOST_PER_ROW or others > _MOST_OTHERS:
            raise ValueError("more operations than a batch needs")


class _Recorded:
    """Stands in for whatever the pickle of an array names: keeps the arguments and the state, and runs nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle._Unpickler):
    """Admits the names in the pickle of an array, and those only as a record.

    The Python implementation: it allocates what the file holds, where the C one believes the sizes that a file claims.
    """

    # All operations but the one that allocates by its claim here too.
    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]}  # noqa: RUF012
    admitted = frozenset(
        [
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
        ]
    )

    def find_class(self, module: str, name: str) -> type[_Recorded]:
        if (module, name) not in self.admitted:
            raise pickle.UnpicklingError(f"the name {module}.{name}, which no array needs")
        return _Recorded
