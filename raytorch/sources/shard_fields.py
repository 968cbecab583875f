"""What the files of a shard's samples hold, by their extensions. Nothing is unpickled."""

import io
import json
import math
import tokenize
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy

_MOST_CLASSES = 1 << 62


def field_of(extension: str, content: bytes) -> Any:
    """A file's content: an array, what JSON has, a text, or a class. Raises ValueError.

    Example:
        >>> field_of("cls", b"7")
        7
    """
    try:
        return _READERS[extension](content)
    except RecursionError as error:
        raise ValueError(str(error)) from error


def class_of(content: bytes) -> int:
    """The number of a class. Raises ValueError."""
    number = int(content.decode())
    if not 0 <= number < _MOST_CLASSES:
        raise ValueError(f"a class is at least 0, not {number}" if number < 0 else "a class is below 2 ** 62")
    return number


def _array_of(content: bytes) -> torch.Tensor:
    """The array of an .npy file, in this machine's order of bytes. No memory is taken for what is not there."""
    file = io.BytesIO(content)
    try:
        version = npy.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {'.'.join(map(str, version))} of the format is not of arrays of numbers")
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, is_fortran, kind = read(file)
    except (tokenize.TokenError, SyntaxError, TypeError, KeyError, MemoryError) as error:
        raise ValueError(f"its header is damaged: {error}") from error
    if kind.hasobject or kind.kind not in "biufc":
        raise ValueError(
            f"an array of numbers, not of {'objects, which would be unpickled' if kind.hasobject else kind}"
        )
    needed, there = math.prod(shape) * kind.itemsize, len(content) - file.tell()
    if min(shape, default=0) < 0 or needed > there:
        raise ValueError(f"cut short: {needed:,} bytes of {kind} {list(shape)}, not {there:,}")
    numbers = np.frombuffer(content, kind, math.prod(shape), file.tell()).astype(kind.newbyteorder("="))
    try:
        return torch.from_numpy(numbers.reshape(shape, order="F" if is_fortran else "C"))
    except TypeError as error:
        raise ValueError(f"PyTorch has no numbers of {kind}") from error


_READERS: dict[str, Callable[[bytes], Any]] = {
    "npy": _array_of,
    "json": json.loads,
    "txt": bytes.decode,
    "cls": class_of,
}
