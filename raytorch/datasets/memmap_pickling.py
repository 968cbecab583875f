"""Arrays that are mapped from a file, on their way to another process of the machine: it maps the file as well."""

from mmap import ALLOCATIONGRANULARITY
from pathlib import Path
from typing import Any

import numpy as np


def reopened(value: Any) -> Any:
    """How pickle is to rebuild an array of ``numpy.memmap``, or a part of one; NotImplemented of anything else.

    That of mode ``c`` is among these, as it may hold changes that the file has not.
    """
    mapped = value
    while type(mapped) is np.ndarray:  # that of numpy.asarray, and parts of it
        mapped = mapped.base
    memory = getattr(mapped, "_mmap", None)
    if type(mapped) is not np.memmap or memory is None or mapped.mode == "c" or not _is_file(mapped.filename):
        return NotImplemented
    mode = "r" if mapped.mode == "r" else "r+"
    start = mapped.offset // ALLOCATIONGRANULARITY * ALLOCATIONGRANULARITY  # as numpy.memmap has it
    place = _address(value) - _address(np.frombuffer(memory, np.uint8))
    whole = (mapped.filename, mode, start, len(memory))
    return _opened, (*whole, value.dtype, value.shape, place, value.strides)


def _is_file(name: Any) -> bool:
    return name is not None and Path(name).is_file()


def _address(array: "np.ndarray[Any, Any]") -> int:
    return int(array.__array_interface__["data"][0])


def _opened(
    name: Any,
    mode: Any,
    start: int,
    length: int,
    dtype: "np.dtype[Any]",
    shape: tuple[int, ...],
    place: int,
    strides: tuple[int, ...],
) -> "np.memmap[Any, Any]":
    whole: Any = np.memmap(name, np.uint8, mode, start, (length,))
    array: Any = np.ndarray(shape, dtype, whole, place, strides).view(np.memmap)
    array._mmap, array.filename, array.offset, array.mode = whole._mmap, whole.filename, start, mode
    return array  # type: ignore[no-any-return]
