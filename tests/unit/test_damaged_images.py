"""Images that are damaged, or claim what they are not: each is refused by itself, and the process goes on."""

import itertools
import tracemalloc
from contextlib import suppress

import numpy as np
import pytest
import torch
from image_files import encoded, picture, png_chunk, png_of

from raytorch.sources.image_changes import centre, covering
from raytorch.sources.image_decoding import decoded
from raytorch.sources.png_decoding import decoded_png

HEIGHT, WIDTH = 11, 13
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
KINDS = [
    (0, 1),
    (0, 2),
    (0, 4),
    (0, 8),
    (0, 16),
    (2, 8),
    (2, 16),
    (3, 1),
    (3, 2),
    (3, 4),
    (3, 8),
    (4, 8),
    (4, 16),
    (6, 8),
    (6, 16),
]
PASSES = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
PALETTE = png_chunk(b"PLTE", bytes(range(120)))  # of 40 colours, fewer than 8 bits may name


def rows_of(kind: int, bits: int, *, interlaced: bool) -> bytes:
    """Noise behind filters of all kinds."""
    rng = np.random.default_rng(0)
    extents = [
        (-(-(HEIGHT - top) // down), -(-(WIDTH - left) // on))
        for top, left, down, on in (PASSES if interlaced else [(0, 0, 1, 1)])
    ]
    lengths = [-(-columns * bits * CHANNELS[kind] // 8) for rows, columns in extents for _ in range(rows)]
    return b"".join(bytes([number % 5]) + rng.bytes(length) for number, length in enumerate(lengths))


def png(kind: int, bits: int, *between: bytes, interlaced: bool = False) -> bytes:
    return png_of(
        kind, bits, rows_of(kind, bits, interlaced=interlaced), (HEIGHT, WIDTH), *between, interlaced=interlaced
    )


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(("kind", "bits"), KINDS)
def test_png_images_are_what_torchvision_makes_of_them(kind: int, bits: int, interlaced: bool) -> None:
    palette = png_chunk(b"PLTE", bytes(range(3 * 2 ** min(bits, 5))))
    content = png(kind, bits, *([palette, png_chunk(b"tRNS", b"\0")] if kind == 3 else []), interlaced=interlaced)
    theirs = torch.ops.image.decode_image(torch.frombuffer(bytearray(content), dtype=torch.uint8), 3, False)
    expected = theirs if theirs.dtype == torch.uint8 else (theirs.int() >> 8).to(torch.uint8)
    assert torch.equal(decoded(content).permute(2, 0, 1), expected)


@pytest.mark.parametrize(("kind", "bits"), [(2, 8), (3, 8), (0, 16), (6, 8)])
def test_every_damaged_byte_of_a_png_is_found(kind: int, bits: int) -> None:
    content = png(kind, bits, *([PALETTE] if kind == 3 else []))
    end = content.index(b"IEND") - 4
    for place, mask in itertools.product(range(end), (1, 255)):
        damaged = content[:place] + bytes([content[place] ^ mask]) + content[place + 1 :]
        with pytest.raises(ValueError, match=r"^found "):
            decoded(damaged)
    for length in range(end):
        with pytest.raises(ValueError, match=r"^found "):
            decoded(content[:length])
    assert torch.equal(decoded(content[:end]), decoded(content))  # without its end, all of the image is there


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (png_of(2, 8, rows_of(2, 8, interlaced=False)[:-1], (HEIGHT, WIDTH)), "expected 440 bytes of rows in its data"),
        (png_of(2, 8, b"\5" + bytes(3), (1, 1)), "cannot decode image data"),
        (png_of(2, 8, bytes(4), (1, 1), png_chunk(b"IDEA", b"")), "a chunk b'IDEA' is not known"),
        (png_of(2, 4, bytes(40), (1, 1)), "its header is of no image"),
        (png_of(2, 8, b"", (0, 5)), "its header is of no image"),
        (png(3, 8), "its palette has 0 bytes"),
        (png(3, 8, png_chunk(b"PLTE", bytes(7))), "its palette has 7 bytes"),
        (png(3, 8, png_chunk(b"PLTE", bytes(771))), "its palette has 771 bytes"),
        (b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", bytes(12)), "it does not begin with its header"),
        (png_of(2, 8, bytes(10**6), (2**14, 2**14)), "expected 805,322,752 bytes of rows in its data, found 1,000,000"),
    ],
)
def test_a_png_that_is_none_behind_right_checksums_is_told(content: bytes, told: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=rf"^found a PNG image that cannot be read: {told}"):
            decoded(content)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20  # not for what is claimed
    finally:
        tracemalloc.stop()


def test_a_colour_that_the_palette_lacks_is_black() -> None:
    content = png_of(3, 8, b"\0" + bytes([39, 40, 255]), (1, 3), PALETTE)
    assert decoded_png(content).tolist() == [[[117, 118, 119], [0, 0, 0], [0, 0, 0]]]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_images_damaged_anywhere_are_refused_or_read(form: str) -> None:
    rng = np.random.default_rng(0)
    content = encoded(picture(0), form)
    for _ in range(400):
        damaged = bytearray(content)
        for place in rng.integers(0, len(content), rng.integers(1, 4)):
            damaged[place] = rng.integers(256)
        start, stop = np.sort(rng.integers(0, len(content), 2))
        with suppress(ValueError):
            assert decoded(bytes(damaged[:start] + damaged[stop:] if rng.random() < 0.3 else damaged)).shape[2] == 3


@pytest.mark.parametrize("marker", [b"\xff\x01", b"\xff\xd3", b"\xff\x00", b"junk", b"\xff\xff"])
def test_the_size_of_a_jpeg_is_that_which_its_decoder_finds(marker: bytes) -> None:
    large = encoded(picture(0, 400, 300), "JPEG")
    decoy = bytes.fromhex("ffc0 0011 08 0008 0008 03 012200 021101 031101")  # the frame of 8 x 8 pixels, in a comment
    comment = b"\xff\xfe\xff\xff" + bytes(65_533) + b"\xff\xfe\x01\x00" + decoy * 13 + bytes(254 - 13 * len(decoy))
    content = b"\xff\xd8\xff\xfe\x00\x02" + marker + comment + large[2:]
    assert decoded(content).shape == (400, 300, 3)
    with pytest.raises(ValueError, match="found one that claims 65,535 x 65,535 pixels"):
        decoded(content.replace(b"\x01\x90\x01\x2c", b"\xff" * 4))


def test_an_image_out_of_all_proportion_is_cut_before_it_is_enlarged() -> None:
    line = torch.arange(9_000, dtype=torch.float32).div(40).to(torch.uint8)[None, :, None].expand(-1, -1, 3)
    wide, high = covering(line, 32, 32), covering(line.transpose(0, 1), 32, 32)
    assert (wide.shape, high.shape) == ((32, 64 * 32, 3), (64 * 32, 32, 3))
    middle = centre(wide, 32, 32)[:, :, 0]
    assert (int(middle.min()), int(middle.max())) == (112, 112)  # that of the middle of the line
