"""Images from the bytes of files: JPEG and WebP by torchvision's decoders, and PNG."""

import re

import torch
import torchvision.io  # which loads the operators
from torch import Tensor

from raytorch.errors import DataError
from raytorch.sources.png_decoding import SIGNATURE, decoded_png, png_size

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MOST_PIXELS = 1 << 28
"""Of an image: what claims more is refused before memory is taken for it."""
# The operators, as their wrappers warn at each call that torchvision is to leave them out some day.
_operators = torch.ops.image
_RGB = 3  # of torchvision's ImageReadMode
_FRAMES = range(0xC0, 0xD0)
_NO_FRAMES = (0xC4, 0xC8, 0xCC)
_ALONE = (0x00, 0x01, *range(0xD0, 0xD8))
"""Markers without a length, and what stands for a byte of data."""
_NOT_BEFORE_A_FRAME = (0xD8, 0xD9, 0xDA)


def require_decoders() -> None:
    """Raise DataError where torchvision has no decoders, as one that was built without them."""
    if not (hasattr(_operators, "decode_image") and hasattr(_operators, "decode_webp")):
        raise DataError(
            f"torchvision {torchvision.__version__} decodes no images here; install one of at least 0.26 that does, as "
            "those of PyPI"
        )


def decoded(content: bytes) -> Tensor:
    """An image as uint8 (H, W, 3): grey ones and palettes in colour, without transparency, 16 bits by their upper 8.

    It is turned as its EXIF orientation says, for JPEG and PNG. Raises ValueError, which says what was found.

    Example:
        >>> decoded(Path("cat.jpg").read_bytes()).shape
        torch.Size([375, 500, 3])
    """
    kind, (height, width) = _described(content)
    if height * width > MOST_PIXELS:
        raise ValueError(f"found one that claims {height:,} x {width:,} pixels, of which {MOST_PIXELS:,} are allowed")
    try:
        pixels = decoded_png(content) if kind == "PNG" else _by_torchvision(content, kind)
    except (ValueError, RuntimeError) as error:
        reason = re.sub(r"^\S+, \S+:\d+, ", "", str(error).partition("\n")[0])  # without torchvision's own file
        raise ValueError(f"found a {kind} image that cannot be read: {reason}") from None
    return pixels.contiguous()


def _by_torchvision(content: bytes, kind: str) -> Tensor:
    encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    if kind == "WebP":
        pixels: Tensor = _operators.decode_webp(encoded, _RGB)
    else:
        pixels = _operators.decode_image(encoded, _RGB, True)
    return pixels.permute(1, 2, 0)


def _described(content: bytes) -> tuple[str, tuple[int, int]]:
    """What an image is, and the height and width that it claims. Raises ValueError for what is none."""
    if content.startswith(b"\xff\xd8\xff"):
        return "JPEG", _jpeg_size(content)
    if content.startswith(SIGNATURE):
        return "PNG", png_size(content)
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WebP", _webp_size(content)
    raise ValueError(f"found {'nothing in it' if not content else f'bytes that begin with {content[:8]!r}'}")


def _jpeg_size(content: bytes) -> tuple[int, int]:
    """That of the first frame, which is found as libjpeg finds it: it passes over whatever is no marker."""
    place = 2
    while (place := content.find(b"\xff", place)) >= 0 and place + 9 <= len(content):
        marker = content[place + 1]
        if marker == 0xFF:  # filling
            place += 1
        elif marker in _ALONE:
            place += 2
        elif marker in _FRAMES and marker not in _NO_FRAMES:
            return _number(content[place + 5 : place + 7]), _number(content[place + 7 : place + 9])
        elif marker in _NOT_BEFORE_A_FRAME:
            break
        else:
            place += 2 + max(2, _number(content[place + 2 : place + 4]))
    raise ValueError("found a JPEG image without its size, cut short or damaged")


def _webp_size(content: bytes) -> tuple[int, int]:
    form, head = content[12:16], content[20:30]
    if form == b"VP8X":
        return 1 + _little(head[7:10]), 1 + _little(head[4:7])
    if form == b"VP8L":
        bits = _little(head[1:5])
        return 1 + (bits >> 14 & 0x3FFF), 1 + (bits & 0x3FFF)
    return _little(head[8:10]) & 0x3FFF, _little(head[6:8]) & 0x3FFF


def _number(part: bytes) -> int:
    return int.from_bytes(part, "big")


def _little(part: bytes) -> int:
    return int.from_bytes(part, "little")
