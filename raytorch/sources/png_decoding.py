"""PNG images from bytes that may be damaged anywhere: all of them are checked before Pillow undoes the filters.

torchvision's own decoder ends the process where libpng finds fault with a file.
"""

import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY, _COLOUR, _PALETTE, _GREY_ALPHA, _COLOUR_ALPHA = 0, 2, 3, 4, 6
_CHANNELS = {_GREY: 1, _COLOUR: 3, _PALETTE: 1, _GREY_ALPHA: 2, _COLOUR_ALPHA: 4}
_FORMS = {
    (_GREY, 1): ("1", "1"),
    (_GREY, 2): ("L", "L;2"),
    (_GREY, 4): ("L", "L;4"),
    (_GREY, 8): ("L", "L"),
    (_GREY, 16): ("L", "L;16B"),
    (_COLOUR, 8): ("RGB", "RGB"),
    (_COLOUR, 16): ("RGB", "RGB;16B"),
    (_PALETTE, 1): ("P", "P;1"),
    (_PALETTE, 2): ("P", "P;2"),
    (_PALETTE, 4): ("P", "P;4"),
    (_PALETTE, 8): ("P", "P"),
    (_GREY_ALPHA, 8): ("LA", "LA"),
    (_GREY_ALPHA, 16): ("RGBA", "LA;16B"),
    (_COLOUR_ALPHA, 8): ("RGBA", "RGBA"),
    (_COLOUR_ALPHA, 16): ("RGBA", "RGBA;16B"),
}
"""What Pillow calls the kinds and bits that there are: decoded, and in the file."""
_PASSES = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
"""Of interlaced images: the first row and column, and the steps to the next."""
_ORIENTATION = 0x112
_TURNS = {2: (1,), 3: (0, 1), 4: (0,), 5: (), 6: (1,), 7: (0, 1), 8: (0,)}
"""What is mirrored for an orientation of EXIF; from 5 on, rows are made columns before."""


class _Header(NamedTuple):
    height: int
    width: int
    kind: int
    bits: int
    is_interlaced: bool

    @property
    def size(self) -> int:
        """Bytes of the rows, each with the number of its filter in front."""
        passes = _PASSES if self.is_interlaced else [(0, 0, 1, 1)]
        extents = [(-(-(self.height - top) // down), -(-(self.width - left) // on)) for top, left, down, on in passes]
        bits = self.bits * _CHANNELS[self.kind]
        return sum(rows * (1 + -(-columns * bits // 8)) for rows, columns in extents if rows > 0 and columns > 0)


def png_size(content: bytes) -> tuple[int, int]:
    """The height and width that an image claims.

    Example:
        >>> png_size(Path("cat.png").read_bytes())
        (375, 500)
    """
    return _number(content[20:24]), _number(content[16:20])


def decoded_png(content: bytes) -> Tensor:
    """An image as uint8 (H, W, 3), turned as it says. Raises ValueError, which says what is wrong."""
    chunks = _chunks(content)
    header = _header(*next(chunks, (b"", b"")))
    palette, exif, data = b"", b"", []
    for kind, body in chunks:
        if kind == b"IDAT":
            data.append(body)
        elif kind == b"PLTE":
            palette = body
        elif kind == b"eXIf":
            exif = body
        elif kind[:1].isupper():
            raise ValueError(f"a chunk {kind!r} is not known")
    return _turned(_pixels(header, _inflated(b"".join(data), header.size), palette), _orientation(exif))


def _chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kinds and bodies up to the last of the pixels. What may be left out is not held to its checksum, but EXIF is."""
    place, is_data = len(SIGNATURE), False
    while place < len(content):
        kind, end = content[place + 4 : place + 8], place + 8 + _number(content[place : place + 4])
        if is_data and kind != b"IDAT":
            return
        is_data = kind == b"IDAT"
        if not kind.isalpha() or end + 4 > len(content):
            raise ValueError(f"cut short or damaged at byte {place:,}")
        body = content[place + 8 : end]
        is_checked = kind[:1].isupper() or kind == b"eXIf"
        if is_checked and zlib.crc32(body, zlib.crc32(kind)) != _number(content[end : end + 4]):
            raise ValueError(f"damaged between byte {place:,} and byte {end + 4:,}, as the checksum there says")
        yield kind, body
        place = end + 4


def _header(kind: bytes, body: bytes) -> _Header:
    if kind != b"IHDR" or len(body) != 13:
        raise ValueError("it does not begin with its header")
    bits, colours, compression, filters, interlace = body[8:]
    header = _Header(_number(body[4:8]), _number(body[:4]), colours, bits, bool(interlace))
    if (colours, bits) not in _FORMS or compression or filters or interlace > 1 or not header.height * header.width:
        raise ValueError("its header is of no image")
    return header


def _inflated(data: bytes, size: int) -> bytes:
    try:
        rows = zlib.decompressobj().decompress(data, size)
    except zlib.error as error:
        raise ValueError(f"its data is damaged: {error}") from error
    if len(rows) < size:
        raise ValueError(f"expected {size:,} bytes of rows in its data, found {len(rows):,}")
    return rows


def _pixels(header: _Header, rows: bytes, palette: bytes) -> Tensor:
    mode, form = _FORMS[header.kind, header.bits]
    stored = zlib.compress(rows, 0)  # which Pillow undoes in no time, as it takes rows in no other form
    image = Image.frombytes(mode, (header.width, header.height), stored, "zip", form, header.is_interlaced)
    if header.kind == _PALETTE:
        if not palette or len(palette) % 3 or len(palette) > 768:
            raise ValueError(f"its palette has {len(palette):,} bytes")
        image.putpalette(palette.ljust(768, b"\0"))
    return torch.from_numpy(np.array(image if mode == "RGB" else image.convert("RGB")))


def _turned(image: Tensor, orientation: int) -> Tensor:
    if orientation not in _TURNS:
        return image
    return (image.transpose(0, 1) if orientation > 4 else image).flip(_TURNS[orientation])


def _orientation(exif: bytes) -> int:
    """That of the first directory of EXIF; 0 if there is none."""
    order = {b"II*\0": "little", b"MM\0*": "big"}.get(exif[:4])
    if order is None:
        return 0
    start = _number(exif[4:8], order)
    end = min(len(exif), start + 2 + 12 * _number(exif[start : start + 2], order))
    for place in range(start + 2, end - 11, 12):
        if _number(exif[place : place + 2], order) == _ORIENTATION:
            return _number(exif[place + 8 : place + 10], order)
    return 0


def _number(part: bytes, order: str = "big") -> int:
    return int.from_bytes(part, order)  # type: ignore[arg-type]
