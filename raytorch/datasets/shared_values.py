"""Values on their way between two processes of one machine: in memory that is a file without a name.

It is the sender's to write and the receiver's to map, and goes when the receiver's arrays and tensors in it have gone.
Nothing of it has to fit into a pipe or into /dev/shm.

In it there are the count of a value's parts, the size of each in bytes, and the parts: the first is a pickle, the
others are the bytes of arrays and tensors, which are not copied into that.
"""

import io
import marshal
import os
import pickle
import tempfile
from collections.abc import Callable, Sequence
from mmap import ACCESS_COPY, ACCESS_DEFAULT, mmap
from types import CodeType
from typing import Any

import cloudpickle
import torch
from torch import Tensor

from raytorch.datasets.memmap_pickling import reopened

_ALIGNMENT = 64
_NUMBER = 8


def packed(value: Any) -> int:
    """A file that holds a value, as the number of its descriptor, which is the caller's to close.

    Raises what pickle does for a value that cannot be sent.
    """
    return _file_of(parts_of(value))


def packed_data(value: Any) -> int:
    """As :func:`packed`, of what is read in processes that have nothing else of this one.

    Classes and functions of the running program are sent whole, since its ``__main__`` is not imported there, and
    arrays of numpy.memmap by the place that they have in their file.
    """
    return _file_of(_parts(value, _DataPickler))


def unpacked(file: int, *, is_own: bool = False) -> Any:
    """The value that a file of :func:`packed` holds. It is closed; arrays and tensors may be written to.

    With ``is_own`` what is written is this process's own, and not seen by others that map the file.
    """
    try:
        return value_in(memoryview(mmap(file, 0, access=ACCESS_COPY if is_own else ACCESS_DEFAULT)))
    finally:
        os.close(file)


def parts_of(value: Any) -> list[memoryview]:
    """What is written of a value. Raises what pickle does for one that cannot be sent."""
    try:
        return _parts(value, _Pickler)
    except (AttributeError, TypeError, pickle.PicklingError):  # of a class without a name that is found again, say
        return _parts(value, _PicklerByValue)


def size_of(parts: Sequence[memoryview]) -> int:
    """The bytes that they take with all that is around them."""
    return _padded((len(parts) + 1) * _NUMBER) + sum(_padded(part.nbytes) for part in parts)


def write(parts: Sequence[memoryview], memory: memoryview) -> None:
    """Write them at the start of ``memory``, which has room for them."""
    head = _head(parts)
    memory[: len(head)] = head
    start = _padded(len(head))
    for part in parts:
        memory[start : start + part.nbytes] = part
        start += _padded(part.nbytes)


def value_in(memory: memoryview) -> Any:
    """The value of the parts that ``memory`` begins with, in which arrays and tensors stay."""
    count = int.from_bytes(memory[:_NUMBER], "little")
    start = _padded((count + 1) * _NUMBER)
    parts = []
    for place in range(_NUMBER, (count + 1) * _NUMBER, _NUMBER):
        size = int.from_bytes(memory[place : place + _NUMBER], "little")
        parts.append(memory[start : start + size])
        start += _padded(size)
    return pickle.loads(parts[0], buffers=parts[1:])  # noqa: S301 (of a process of this very program)


def unnamed_file() -> int:
    """A file in memory, as the number of its descriptor."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("raytorch")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _parts(value: Any, pickler: Callable[[io.BytesIO, list[Any]], Any]) -> list[memoryview]:
    buffers: list[Any] = []
    stream = io.BytesIO()
    pickler(stream, buffers).dump(value)
    return [stream.getbuffer(), *(buffer.raw() for buffer in buffers)]


def _file_of(parts: Sequence[memoryview]) -> int:
    file = unnamed_file()
    with open(file, "wb", closefd=False) as out:
        for part in (memoryview(_head(parts)), *parts):
            out.write(part)
            out.write(bytes(_padded(len(part)) - len(part)))
    return file


def _head(parts: Sequence[memoryview]) -> bytes:
    return b"".join(size.to_bytes(_NUMBER, "little") for size in (len(parts), *(part.nbytes for part in parts)))


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class _Pickler(pickle.Pickler):
    """As pickle's own, but for the numbers of tensors, which it would copy several times."""

    def __init__(self, stream: io.BytesIO, buffers: list[Any]) -> None:
        super().__init__(stream, protocol=5, buffer_callback=buffers.append)

    def reducer_override(self, value: Any) -> Any:
        """Called for each object that is not of Python's plain types."""
        return _reduced(value)


class _PicklerByValue(cloudpickle.CloudPickler):
    """The same for classes and functions as well that cannot be imported by a name."""

    def __init__(self, stream: io.BytesIO, buffers: list[Any]) -> None:
        super().__init__(stream, protocol=5, buffer_callback=buffers.append)

    def reducer_override(self, value: Any) -> Any:
        """Called for each object that is not of Python's plain types."""
        if type(value) is CodeType:  # with its file, of which tracebacks tell, and which cloudpickle leaves out
            return marshal.loads, (marshal.dumps(value),)
        reduced = _reduced(value)
        return super().reducer_override(value) if reduced is NotImplemented else reduced


class _DataPickler(_PicklerByValue):
    """The same, and what is mapped from a file stays there."""

    def reducer_override(self, value: Any) -> Any:
        """Called for each object that is not of Python's plain types."""
        reduced = reopened(value)
        return super().reducer_override(value) if reduced is NotImplemented else reduced


def _reduced(value: Any) -> Any:
    if type(value) is not Tensor or value.device.type != "cpu" or value.layout is not torch.strided:
        return NotImplemented
    if value.is_quantized or value.is_conj() or value.is_neg():
        return NotImplemented
    order = sorted(range(value.dim()), key=value.stride, reverse=True)
    dense = value.detach().permute(order)
    if not dense.is_contiguous():
        order, dense = list(range(value.dim())), value.detach().contiguous()
    numbers: Any = dense.reshape(-1).view(torch.uint8).numpy() if dense.numel() else b""
    place = (value.dtype, tuple(dense.shape), order, value.requires_grad)
    return _tensor, (pickle.PickleBuffer(numbers), *place)


def _tensor(numbers: Any, dtype: torch.dtype, shape: tuple[int, ...], order: list[int], requires_grad: bool) -> Tensor:
    flat = torch.frombuffer(numbers, dtype=dtype) if len(memoryview(numbers)) else torch.empty(0, dtype=dtype)
    there = flat.view(shape).permute([order.index(place) for place in range(len(order))])
    return there.requires_grad_(requires_grad) if requires_grad else there
