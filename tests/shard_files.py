"""Tar shards and their samples, made by tarfile, and headers of tar archives."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from image_files import encoded, picture


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def files_of(number: int) -> dict[str, bytes]:
    return {
        "png": encoded(picture(number), "PNG"),
        "cls": f"{number % 3}\n".encode(),
        "left.npy": npy(np.arange(3, dtype=np.float32) + number),
        "json": json.dumps({"number": number}).encode(),
        "txt": f"Nr. {number}, größer".encode(),
    }


def write_shard(path: Path, files: Iterable[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def sample_files(numbers: Iterable[int], key: str = "{:05}") -> list[tuple[str, bytes]]:
    return [
        (f"{key.format(number)}.{name}", content) for number in numbers for name, content in files_of(number).items()
    ]


def header(name: str = "a.txt", size: bytes = b"00000000005\0", kind: bytes = b"0") -> bytes:
    """A header of a tar archive with the right sum."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    block[124:136], block[156:157], block[148:156] = size, kind, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


CONTENT = b"hello".ljust(512, b"\0")
END = bytes(1024)


def pax(record: bytes) -> bytes:
    return header("x", b"%011o\0" % len(record), b"x") + record.ljust(512, b"\0")
