"""Errors of the readers of data files: a DataError says what was expected, what was found, and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raytorch.errors import DataError

Bytes = NDArray[np.uint8]

CLASSES = 10


def checked_labels(path: Path, labels: Bytes) -> Bytes:
    """The labels, unless one is outside 0..9. Raises DataError."""
    if labels.max() >= CLASSES:
        raise fault(path, f"labels from 0 to {CLASSES - 1}", f"{labels.max()}")
    return labels


@contextmanager
def reading(path: Path, expected: str, *failures: type[Exception]) -> Iterator[None]:
    """Turn ``failures`` in the block into a DataError about the file."""
    try:
        yield
    except DataError:
        raise
    except failures as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        printable = reason if reason.isprintable() else ascii(reason)  # the text may come from the file
        raise fault(path, expected, f"one that cannot be read ({printable})") from error


def fault(path: Path, expected: str, found: str) -> DataError:
    """The error about a file that is there and is not what it should be."""
    remedy = "put an intact copy there, or delete it and download it anew: data.download=true"
    return DataError(f"{path}: expected {expected}, found {found}; {remedy}")
