"""Size of what a file of ``torch.save`` would build, found out without building it.

``torch.load(weights_only=True)`` runs no code, but it builds what a file asks for, of any size. Here the operations of
the file's pickle are followed with stand-ins for all that it may name, and each tensor is held against the bytes that
the file has for it.
"""

import pickletools
import zipfile
from collections.abc import Callable
from enum import Enum
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from raytorch.errors import ModelFileError
from raytorch.serialization.file_kinds import TENSOR_DTYPES, refuse_packed_archive

MOST_OPERATIONS = 2**21
"""Operations of a pickle at most, each of which makes one object at most: room for some 60,000 tensors."""

_BYTES = {
    **dict.fromkeys(("BoolStorage", "ByteStorage", "CharStorage", "UntypedStorage"), 1),
    **dict.fromkeys(("ShortStorage", "HalfStorage", "BFloat16Storage"), 2),
    **dict.fromkeys(("IntStorage", "FloatStorage"), 4),
    **dict.fromkeys(("LongStorage", "DoubleStorage", "ComplexFloatStorage"), 8),
    "ComplexDoubleStorage": 16,
}


def refuse_bombs(path: Path) -> None:
    """Refuse a file that would build more than it holds, or anything but tensors, plain values, lists and dicts."""
    refuse_packed_archive(path)
    try:
        content, sizes = _entries(path)
        _Outline(sizes).follow(content)
    except _RefusedError as error:
        raise ModelFileError(f"{path} {error}; expected tensors by name; nothing in it was run") from None
    except Exception as error:  # of many kinds, as a pickle can go wrong at any place
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ModelFileError(f"{path} is damaged ({ascii(reason)[1:-1]}); write it again, or fetch it again") from None


class _RefusedError(Exception):
    """The pickle asks for something that no tensor needs, or for more than is there."""


class _Stand(Enum):
    """Stand-in for whatever has no size of its own."""

    LIST = "a list"
    DICT = "a dictionary"
    ANYTHING = "something made of parts that were checked"


class _StorageType(NamedTuple):
    """Stand-in for a class of storages."""

    item_bytes: int


class _Storage(NamedTuple):
    """Stand-in for a storage whose elements are in the file."""

    elements: int


def _entries(path: Path) -> tuple[bytes, dict[str, int]]:
    """The pickle in a file, and the size of each of its other entries by name."""
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        folders = {info.filename.partition("/")[0] for info in infos}
        sizes = {info.filename.partition("/")[2]: info.file_size for info in infos}
        if len(folders) != 1 or len(sizes) != len(infos):
            raise _RefusedError("has several entries of the same name")
        return archive.read(f"{folders.pop()}/data.pkl"), sizes


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _Stand:
    """A tensor in a storage, which may be larger than it and not smaller."""
    numbers = [offset, *size, *stride]
    if not isinstance(storage, _Storage) or any(type(number) is not int or number < 0 for number in numbers):
        raise _RefusedError("has a tensor that is in no storage, or of an impossible size")
    if prod(size) > storage.elements:
        raise _RefusedError(f"has a tensor of {prod(size):,} elements in a storage of {storage.elements:,}")
    return _Stand.ANYTHING


def _made_of(*_: Any) -> _Stand:
    return _Stand.ANYTHING


_NAMES: dict[str, Any] = {
    "collections OrderedDict": lambda: _Stand.DICT,
    "torch Size": _made_of,
    "torch device": _made_of,
    "torch.serialization _get_layout": _made_of,
    "torch._utils _rebuild_sparse_tensor": _made_of,
    "torch._utils _rebuild_parameter": _made_of,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_tensor_v3": _tensor,
    **dict.fromkeys((str(dtype).replace(".", " ") for dtype in TENSOR_DTYPES), _Stand.ANYTHING),
    **{
        f"{module} {name}": _StorageType(size) for name, size in _BYTES.items() for module in ("torch", "torch.storage")
    },
}
"""Names that a pickle may hold, and what stands for each."""


class _Outline:
    """The stack of a pickle, with stand-ins on it."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self._sizes = sizes
        self._names = {**_NAMES, "_codecs encode": self.encoded}
        self._encoded = self._held = 0
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def follow(self, content: bytes) -> None:
        """Follow the pickle's operations to their end."""
        self._held = len(content)
        for number, (operation, argument, _) in enumerate(pickletools.genops(content)):
            if number >= MOST_OPERATIONS:
                raise _RefusedError(f"has a pickle of more than {MOST_OPERATIONS:,} operations")
            name = operation.name
            if name in _PUSHED:
                self._stack.append(_PUSHED[name])
            elif name in _ARGUMENTS:
                self._stack.append(argument)
            elif name in _STEPS:
                _STEPS[name](self, argument)
            else:
                raise _RefusedError(f"has the operation {name}, which no tensor needs")

    def mark(self, _: Any) -> None:
        self._marks.append(len(self._stack))

    def pop(self, count: int) -> list[Any]:
        taken = self._stack[len(self._stack) - count :]
        del self._stack[len(self._stack) - count :]
        return taken

    def pop_mark(self) -> list[Any]:
        return self.pop(len(self._stack) - self._marks.pop())

    def tuple_of(self, parts: list[Any]) -> None:
        self._stack.append(tuple(parts))

    def set_items(self, items: list[Any]) -> None:
        for key in items[::2]:
            if isinstance(key, tuple) and any(isinstance(part, tuple) for part in key):
                raise _RefusedError("has a key of nested tuples")  # hashed, deep ones would overflow the stack

    def put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def look_up(self, name: str) -> None:
        if name not in self._names:
            shown = ascii(name.replace(" ", ".")[:99])[1:-1]
            raise _RefusedError(f"names {shown}, which is no tensor and could run code")
        self._stack.append(self._names[name])

    def call(self, _: Any) -> None:
        function, arguments = self.pop(2)
        self._stack.append(function(*arguments))

    def encoded(self, text: str, encoding: str) -> _Stand:
        """Bytes, which protocol 2 has as text: one that it holds once could be made many."""
        self._encoded += len(text)
        if encoding != "latin1" or self._encoded > self._held:
            raise _RefusedError("has bytes in another form than torch.save's, or repeats them")
        return _Stand.ANYTHING

    def build(self, _: Any) -> None:
        target, _state = self._stack[-2], self.pop(1)
        if target is not _Stand.DICT:
            raise _RefusedError("has a state of something that is no dictionary")

    def find_storage(self, _: Any) -> None:
        _kind, item, key, _device, elements = self.pop(1)[0]
        there = self._sizes[f"data/{key}"]
        if not isinstance(item, _StorageType) or type(elements) is not int or elements < 0:
            raise _RefusedError("has a storage of no known kind")
        if elements * item.item_bytes > there:
            raise _RefusedError(f"claims {elements * item.item_bytes:,} bytes for a storage of {there:,}")
        self._stack.append(_Storage(elements))


_PUSHED: dict[str, Any] = {
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
    "EMPTY_TUPLE": (),
    "EMPTY_LIST": _Stand.LIST,
    "EMPTY_DICT": _Stand.DICT,
}
_ARGUMENTS = ("BININT", "BININT1", "BININT2", "BINFLOAT", "LONG1", "BINUNICODE", "SHORT_BINSTRING")
_STEPS: dict[str, Callable[[_Outline, Any], object]] = {
    "PROTO": lambda outline, version: None,
    "STOP": lambda outline, _: None,
    "MARK": _Outline.mark,
    "TUPLE": lambda outline, _: outline.tuple_of(outline.pop_mark()),
    "TUPLE1": lambda outline, _: outline.tuple_of(outline.pop(1)),
    "TUPLE2": lambda outline, _: outline.tuple_of(outline.pop(2)),
    "TUPLE3": lambda outline, _: outline.tuple_of(outline.pop(3)),
    "APPEND": lambda outline, _: outline.pop(1),
    "APPENDS": lambda outline, _: outline.pop_mark(),
    "SETITEM": lambda outline, _: outline.set_items(outline.pop(2)),
    "SETITEMS": lambda outline, _: outline.set_items(outline.pop_mark()),
    "BINPUT": _Outline.put,
    "LONG_BINPUT": _Outline.put,
    "BINGET": _Outline.get,
    "LONG_BINGET": _Outline.get,
    "GLOBAL": _Outline.look_up,
    "REDUCE": _Outline.call,
    "BUILD": _Outline.build,
    "BINPERSID": _Outline.find_storage,
}
"""The operations that torch.load knows."""
