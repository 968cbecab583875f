"""Images in files, made by Pillow."""

import io
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
