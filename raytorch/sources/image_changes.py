"""Changes to images, uint8 (H, W, 3), as torchvision.transforms.v2 makes them, by random numbers of a sample's own."""

from collections.abc import Sequence
from math import exp, log, sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from raytorch.config.image_files import ImageAugment

_RATIOS = 3 / 4, 4 / 3
"""Of width to height, of parts that are resized."""
_TRIES = 10
_interpolate: Any = torch._C._nn._upsample_bilinear2d_aa
"""What torch.nn.functional.interpolate calls, which takes no ``out``."""
_LONGEST = 64
"""How many times as long as what it is to cover an image is left: more of it would fill the memory when it is enlarged.
"""
Box = tuple[int, int, int, int]
"""Top, left, height and width."""


def resized(image: Tensor, height: int, width: int) -> Tensor:
    """Resize bilinearly, with antialiasing, as torchvision's resize does."""
    out = image.new_empty(height, width, 3)
    return resize(_planes(image), out) if image.shape != out.shape else image


def resize(planes: Tensor, out: Tensor) -> Tensor:
    """The same of an image as (1, 3, H, W), into ``out``, uint8 (H, W, 3), of whose size it is made."""
    _interpolate(planes, out.shape[:2], False, None, None, out=_planes(out))
    return out


def _planes(image: Tensor, box: Box | None = None) -> Tensor:
    """An image or its part as (1, 3, H, W), in memory as it was: PyTorch sees by that that colours lie together.

    As a single operation: others take a tenth of the time of an image, as its pixels take the processor's caches.
    """
    rows, columns, colours = image.stride()
    top, left, height, width = box or (0, 0, *image.shape[:2])
    start = image.storage_offset() + rows * top + columns * left
    return image.as_strided((1, 3, height, width), (0, colours, rows, columns), start)


def covering(image: Tensor, height: int, width: int) -> Tensor:
    """Resize so that it is as small as can be and no side below ``height`` and ``width``, its proportions kept.

    Of one that is out of all proportion the middle is taken.
    """
    high, wide = image.shape[:2]
    longest = max(1, _LONGEST * wide * height // width), max(1, _LONGEST * high * width // height)
    if high > longest[0] or wide > longest[1]:
        return covering(centre(image, min(high, longest[0]), min(wide, longest[1])), height, width)
    if height * wide >= width * high:
        return resized(image, height, height * wide // high)
    return resized(image, width * high // wide, width)


def centre(image: Tensor, height: int, width: int) -> Tensor:
    """Cut out of the middle."""
    high, wide = image.shape[:2]
    return cut(image, (round((high - height) / 2), round((wide - width) / 2), height, width))


def cut(image: Tensor, box: Box) -> Tensor:
    """Cut out."""
    top, left, height, width = box
    return image[top : top + height, left : left + width]


class RandomChanges:
    """Those of a configuration.

    Example:
        >>> change = RandomChanges(ImageAugment(crop=True, flip=True), 224, 224)
        >>> change(torch.zeros(256, 300, 3, dtype=torch.uint8), np.random.default_rng(0)).shape
        torch.Size([224, 224, 3])
    """

    def __init__(self, augment: ImageAugment, height: int, width: int) -> None:
        """``height`` and ``width`` are those of what is made."""
        self._augment, self._size = augment, (height, width)
        self._factors = {
            name: most for name in ("brightness", "contrast", "saturation", "hue") if (most := getattr(augment, name))
        }

    def __call__(self, image: Tensor, rng: np.random.Generator, out: Tensor | None = None) -> Tensor:
        """The image, changed as is drawn from ``rng``: in ``out``, uint8 (H, W, 3), or a new one."""
        out = image.new_empty(*self._size, 3) if out is None else out
        if self._augment.resized_crop:
            planes = _planes(image, part_box(image.shape[0], image.shape[1], self._augment.resized_crop, rng))
            # It is mirrored before it is resized, as a part is mostly smaller than what is made of it.
            resize(planes.flip(3) if self._is_mirrored(rng) else planes, out)
        else:
            image = self._anywhere(image, rng) if self._augment.crop else image
            out.copy_(image.flip(1) if self._is_mirrored(rng) else image)
        return out.copy_(self._coloured(out, rng)) if self._factors else out

    def _is_mirrored(self, rng: np.random.Generator) -> bool:
        return self._augment.flip and rng.random() < 0.5

    def _anywhere(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        if pad := self._augment.padding:
            image = torch.nn.functional.pad(image, (0, 0, pad, pad, pad, pad))
        spare = [there - kept for there, kept in zip(image.shape[:2], self._size, strict=True)]
        return cut(image, (_below(spare[0] + 1, rng), _below(spare[1] + 1, rng), *self._size))

    def _coloured(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        """In an order that is drawn too."""
        planes = image.permute(2, 0, 1)
        names = list(self._factors)
        for place in rng.permutation(len(names)).tolist():
            name, most = names[place], self._factors[names[place]]
            low = -most if name == "hue" else max(0.0, 1 - most)
            high = most if name == "hue" else 1 + most
            planes = getattr(functional, f"adjust_{name}")(planes, _between(low, high, rng))
        return planes.permute(1, 2, 0)


def part_box(height: int, width: int, areas: Sequence[float], rng: np.random.Generator) -> Box:
    """A part of an image, of an area and proportions that are drawn as ``RandomResizedCrop`` of torchvision does."""
    for _ in range(_TRIES):
        area = height * width * _between(areas[0], areas[1], rng)
        ratio = exp(_between(log(_RATIOS[0]), log(_RATIOS[1]), rng))
        wide, high = round(sqrt(area * ratio)), round(sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            return _below(height - high + 1, rng), _below(width - wide + 1, rng), high, wide
    high = min(height, round(width / _RATIOS[0]))  # of the middle, the most of what is too long
    wide = min(width, round(height * _RATIOS[1]))
    return (height - high) // 2, (width - wide) // 2, high, wide


def _between(low: float, high: float, rng: np.random.Generator) -> float:
    """As ``rng.uniform``, which takes five times as long."""
    return low + (high - low) * rng.random()


def _below(end: int, rng: np.random.Generator) -> int:
    return int(end * rng.random())
