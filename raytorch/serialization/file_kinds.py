"""Kinds of models' files, found out by their content and without running anything in it."""

import json
import os
import pickletools
import zipfile
from collections.abc import Callable
from enum import StrEnum
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch

from raytorch.errors import ModelFileError
from raytorch.system.regular_files import open_regular

LONGEST_HEADER = 12 * 2**20
"""Bytes of a safetensors header at most: room for some 150,000 tensors. The format's own limit is 100 MB."""
LONGEST_TEXT_PICKLE = 2**16
_MOST_DIMENSIONS = 64  # PyTorch's own limit
DTYPE_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.complex64: "C64",
}
"""The dtypes that safetensors has, by its own names."""
_BITS = {name: 8 * dtype.itemsize for dtype, name in DTYPE_NAMES.items()} | {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
TENSOR_DTYPES = {*DTYPE_NAMES, torch.complex32, torch.complex128}
"""The dtypes of tensors that are saved at all."""


class FileKind(StrEnum):
    """Kinds of file, in words."""

    SAFETENSORS = "a safetensors file"
    STATE_DICT = "a file that torch.save wrote"
    TORCHSCRIPT = "a TorchScript program"
    PT2 = "an exported program (.pt2)"
    ONNX = "an ONNX graph"
    PICKLE = "a bare pickle, which could run commands"
    ZIP = "a zip archive that PyTorch did not write"
    BROKEN_ZIP = "a zip archive that is damaged or cut short"
    EMPTY = "empty"
    UNKNOWN = "in no format that raytorch knows"


_REMEDIES = {
    FileKind.SAFETENSORS: "read it with raytorch.serialization.load_weights or load_model",
    FileKind.STATE_DICT: "read it with raytorch.serialization.load_weights",
    FileKind.TORCHSCRIPT: "read it with raytorch.serialization.load_torchscript",
    FileKind.PT2: "read it with raytorch.serialization.load_program",
    FileKind.ONNX: "read it with raytorch.onnx.load",
    FileKind.PICKLE: "nothing in it was read; ask for the weights as safetensors",
}


def require(path: Path, *expected: FileKind) -> FileKind:
    """What the file is, one of ``expected``. Raises ModelFileError: it is something else, or there is no such file."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            found = _detect(file, path.suffix)
    except FileNotFoundError:
        raise ModelFileError(f"{path}: no such file") from None
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror or error}; expected a model's file") from None
    if found not in expected:
        remedy = _REMEDIES.get(found, "write it again, or fetch it again")
        raise ModelFileError(f"{path} is {found}; expected {' or '.join(expected)}; {remedy}")
    return found


def _detect(file: BinaryIO, suffix: str) -> FileKind:
    """What the file is, by its content; its name counts only where that is no format's."""
    head = file.read(LONGEST_TEXT_PICKLE)
    if not head:
        return FileKind.EMPTY
    if head.startswith(b"PK\x03\x04"):
        return _kind_of_archive(file)
    if head[8:9] == b"{" and head[4:8] == bytes(4):
        return FileKind.SAFETENSORS
    if _is_pickle(head):
        return FileKind.PICKLE
    if _is_onnx(file):
        return FileKind.ONNX
    return FileKind.SAFETENSORS if suffix == ".safetensors" else FileKind.UNKNOWN


def _kind_of_archive(file: BinaryIO) -> FileKind:
    try:
        with zipfile.ZipFile(file) as archive:
            names = {name.partition("/")[2] or name for name in archive.namelist()}
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, OSError):
        return FileKind.BROKEN_ZIP
    if "archive_format" in names or "serialized_exported_program.json" in names:
        return FileKind.PT2
    if "constants.pkl" in names:
        return FileKind.TORCHSCRIPT
    return FileKind.STATE_DICT if "data.pkl" in names else FileKind.ZIP


def _is_pickle(head: bytes) -> bool:
    """Tell whether the file opens as a pickle of protocol 2 to 5, or is a whole one of the older, textual protocols."""
    if head[0] == 0x80 and len(head) > 2 and 2 <= head[1] <= 5:
        return True
    try:
        return [operation.name for operation, _, _ in pickletools.genops(head)][-1] == "STOP" and len(head) > 1
    except (ValueError, IndexError, EOFError, OverflowError):
        return False


def _is_onnx(file: BinaryIO) -> bool:
    """True if the file reads as a protobuf message with the fields ir_version (1) and graph (7) of a ModelProto."""
    size = file.seek(0, 2)
    file.seek(0)
    seen: set[tuple[int, int]] = set()
    for _ in range(1000):
        tag = _varint(file)
        field, wire_type = tag >> 3, tag & 7
        if not field or wire_type not in (0, 1, 2, 5):
            return False
        seen.add((field, wire_type))
        if {(1, 0), (7, 2)} <= seen:
            return True
        length = _varint(file) if wire_type in (0, 2) else {1: 8, 5: 4}[wire_type]
        if wire_type:
            file.seek(min(length, size), 1)
    return False


def _varint(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            break
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            break
    return value


def refuse_packed_archive(path: Path) -> None:
    """Refuse a zip archive whose entries are compressed, or overlap: PyTorch stores them as they are."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    size, unpacked = path.stat().st_size, sum(entry.file_size for entry in entries)
    if unpacked > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ModelFileError(
            f"{path} has {size:,} bytes and would unpack to {unpacked:,}; expected entries as torch.save writes them, "
            "not compressed; write it again with torch.save"
        )


def read_safetensors_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: dtype, shape and place of each tensor by name, and ``__metadata__``.

    Raises ModelFileError: it does not describe the bytes that follow it, without gaps, overlaps or missing ones.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        return described_tensors(path, read_header(path, size, file.read), size)


def read_header(path: Path, size: int, read: Callable[[int], bytes]) -> bytes:
    """The first bytes of a safetensors file of ``size`` bytes, its header with its length before it; ``read`` gives so
    many bytes more of it. Raises ModelFileError for a length that cannot be.
    """
    count = read(8)
    length = int.from_bytes(count, "little")
    if length > min(size - 8, LONGEST_HEADER):
        raise _damaged(
            path,
            f"its header claims {length:,} bytes",
            f"at most {min(max(size - 8, 0), LONGEST_HEADER):,} in a file of {size:,}",
        )
    return count + read(length)


def described_tensors(path: Path, head: bytes, size: int) -> dict[str, Any]:
    """What :func:`read_header` has read, as :func:`read_safetensors_header` gives it; ``size`` is the file's."""
    try:
        header = json.loads(head[8:])
    except (ValueError, RecursionError):
        raise _damaged(path, "its header is not JSON", "a JSON object") from None
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise _damaged(path, "its header is not a JSON object", "tensors by name")
    _check_tensors(path, header, size - len(head))
    return header


def _check_tensors(path: Path, header: dict[str, Any], size: int) -> None:
    """Check that the tensors fill the ``size`` bytes after the header one after the other."""
    place = 0
    tensors = {name: _described(path, name, entry) for name, entry in header.items() if name != "__metadata__"}
    for name, (shape, bits, begin, end) in sorted(tensors.items(), key=lambda item: item[1][2:]):
        needed = -(-prod(shape) * bits // 8)
        if end - begin != needed:
            raise _damaged(path, f"tensor {name!r:.99} of shape {shape} has {end - begin:,} bytes", f"{needed:,}")
        if end > size:
            raise _damaged(path, f"tensor {name!r:.99} ends at byte {end:,} of its data", f"at most {size:,}")
        if begin != place:
            problem = "overlaps the one before it" if begin < place else "leaves a gap before it"
            raise _damaged(path, f"tensor {name!r:.99} {problem}: it begins at byte {begin:,}", f"{place:,}")
        place = end
    if place != size:
        raise _damaged(path, f"{size:,} bytes follow the header", f"the {place:,} that its tensors take")


def _described(path: Path, name: str, entry: Any) -> tuple[list[int], int, int, int]:
    """Shape, bits of an element, and first and last place of a tensor."""
    try:
        shape, (begin, end) = entry["shape"], entry["data_offsets"]
        bits = _BITS[entry["dtype"]]
    except (TypeError, KeyError, ValueError):
        raise _damaged(path, f"tensor {name!r:.99} is not described", "dtype, shape and data_offsets") from None
    numbers = [*shape, begin, end] if isinstance(shape, list) and len(shape) <= _MOST_DIMENSIONS else [None]
    if not (are_sizes(numbers) and (0 not in shape or prod(filter(None, shape)) < 2**60)):
        raise _damaged(path, f"tensor {name!r:.99} has impossible sizes", "64 dimensions at most, of 64 bits each")
    return shape, bits, begin, end


def are_sizes(numbers: list[Any]) -> bool:
    """Tell whether all are whole numbers that a size can be."""
    return all(type(number) is int and 0 <= number < 2**63 for number in numbers)


def _damaged(path: Path, found: str, expected: str) -> ModelFileError:
    return ModelFileError(f"{path} is damaged: {found}; expected {expected}; write it again, or fetch it again")
