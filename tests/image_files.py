"""Images in files, made by Pillow."""

import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def picture(seed: int, height: int = 40, width: int = 60) -> Image.Image:
    """An image of noise over colours that change slowly."""
    rng = np.random.default_rng(seed)
    corners = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    smooth = np.asarray(corners.resize((width, height), Image.Resampling.BILINEAR)).astype(int)
    return Image.fromarray((smooth + rng.integers(-20, 20, smooth.shape)).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    """The bytes of a file of Pillow's format ``form``."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG file with its checksum."""
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


def png_of(
    kind: int, bits: int, rows: bytes, size: tuple[int, int], *between: bytes, interlaced: bool = False
) -> bytes:
    """A PNG file of any kind and bits, of rows with their filters in front, and chunks in front of those."""
    header = size[1].to_bytes(4, "big") + size[0].to_bytes(4, "big") + bytes([bits, kind, 0, 0, interlaced])
    data = zlib.compress(rows)
    parts = png_chunk(b"IDAT", data[:9]) + png_chunk(b"IDAT", data[9:])
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + b"".join(between) + parts + png_chunk(b"IEND", b"")


def make_folders(root: Path, split: str, counts: dict[str, int], **size: int) -> list[Path]:
    """``root/split/CLASS/NUMBER.png``, so many of each class, and where they are, in their order."""
    paths = []
    for label, count in sorted(counts.items()):
        folder = root / split / label
        folder.mkdir(parents=True)
        for number in range(count):
            path = folder / f"{number:03}.png"
            picture(len(paths) + sum(map(ord, split)), **size).save(path)
            paths.append(path)
    return paths
