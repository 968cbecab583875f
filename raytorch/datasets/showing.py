"""What the samples of a run look like, as it would get them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raytorch.config import Augment, ImageData, RunConfig
from raytorch.datasets.checking import class_names, kind_of, opened_splits, parts, told
from raytorch.datasets.loader import MicroBatch, TrainLoader, evaluation_batches
from raytorch.datasets.requests import Split
from raytorch.datasets.sampling import blocks_of
from raytorch.datasets.splits import Splits
from raytorch.errors import DataError, RaytorchError, UserError

_FEW = 8
"""Numbers of a tensor of a sample that are shown."""
_SMALLEST_IMAGE = 4
"""Height and width of what is taken for an image."""
_SEEN = 64
"""Pixels of what can be seen well; each of a smaller image's is several in a picture."""


class Look(NamedTuple):
    """What the first samples of a split look like."""

    images: Tensor | None
    """float32 (N, C, H, W), from 0 to 1, where they are images, or clips, whose frames stand side by side."""
    rows: list[dict[str, str]]
    """What there is to say of each, by column."""


def look_at(config: RunConfig, split: str, samples: int) -> Look:
    """The first samples that a run would train on, changed at random as it changes them, or those of another split.

    Raises UserError where the run has no such split, or it cannot be read.

    Example:
        >>> look_at(RunConfig(epochs=1), "train", 4).images.shape
        torch.Size([4, 1, 8, 8])
    """
    splits, named = opened_splits(config)
    if split not in named:
        raise UserError(f"the run has no split {split!r:.40}, but {', '.join(named)}")
    try:
        looks = [_look(named[split], batch) for batch in _first(config, splits, named[split], samples)]
    except RaytorchError:
        raise
    except Exception as error:
        raise DataError(f"{split}: {told(error, config)}") from error
    images = [look.images for look in looks if look.images is not None]
    rows = [row for look in looks for row in look.rows][:samples]
    return Look(torch.cat(images)[:samples] if images else None, rows)


def write_picture(images: Tensor, out: Path) -> None:
    """Write images, float32 (N, C, H, W), into a file, from left to right and then from top to bottom.

    Raises UserError for a file that cannot be written.
    """
    from torchvision.utils import save_image  # takes a second to import

    larger = max(1, _SEEN // max(images.shape[2:]))
    images = images.repeat_interleave(larger, 2).repeat_interleave(larger, 3)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_image(images, out, nrow=columns_of(len(images)), pad_value=1.0)
    except (OSError, ValueError) as error:  # ValueError: an ending that PIL does not know
        raise UserError(f"{out} cannot be written: {error}; give another path, such as samples.png") from None


def columns_of(images: int) -> int:
    """How many images stand in a row of a picture."""
    return math.ceil(math.sqrt(images))


def _first(config: RunConfig, splits: Splits, split: Split, samples: int) -> Iterator[MicroBatch]:
    """Batches that have so many samples: of what is trained on the first of the run."""
    if split is not splits.train:
        yield from islice(evaluation_batches(split, batch_size=min(samples, len(split))), 1)
        return
    loader = TrainLoader(
        split,
        batch_size=config.batch_size,
        seed=config.seed,
        augment=config.data.augment if isinstance(config.data, ImageData) else Augment(),
        weights=splits.weights,
        blocks=blocks_of(split) if config.shuffle == "blocks" else None,
    )
    yield from (batch for [batch] in islice(loader.remaining(), math.ceil(samples / config.batch_size)))


def _look(split: Split, batch: MicroBatch) -> Look:
    values = list(parts(batch.content))
    first = values[0][1]
    images = _pictures(first) if isinstance(first, Tensor) else None
    describe = getattr(split, "describe", None)
    if describe is not None:
        return Look(images, _described(describe(batch.content), batch.samples))
    if images is not None:
        values = [("label", value) for _, value in values[1:]] if len(values) == 2 else values[1:]
    names = class_names(split)
    columns = {key: [_cell(value, place, names) for place in range(batch.samples)] for key, value in values}
    return Look(images, [{key: cells[place] for key, cells in columns.items()} for place in range(batch.samples)])


def _described(told: Any, samples: int) -> list[dict[str, str]]:
    is_right = isinstance(told, Sequence) and len(told) == samples and all(isinstance(row, Mapping) for row in told)
    if not is_right:
        raise DataError(
            f"describe must return a list of {samples:,} dictionaries, one for each sample, not {told!r:.80}"
        )
    return [{str(key): str(value) for key, value in row.items()} for row in told]


def _pictures(values: Tensor) -> Tensor | None:
    """Images or clips as they can be seen; None of what is none."""
    if values.dim() == 5 and values.shape[1] in (1, 3):  # (B, C, T, H, W)
        values = values.transpose(2, 3).flatten(3)
    is_image = values.dim() == 4 and values.shape[1] in (1, 3) and min(values.shape[2:]) >= _SMALLEST_IMAGE
    if not is_image or values.is_complex():
        return None
    if values.dtype == torch.uint8:
        return values.float() / 255
    images = values.float()
    low, high = images.flatten(1).aminmax(dim=1)
    if low.min() >= 0 and high.max() <= 1:
        return images
    low, high = (each.view(-1, 1, 1, 1) for each in (low, high))  # of normalized ones
    return (images - low) / (high - low).clamp(min=1e-9)


def _cell(value: Any, place: int, names: Mapping[int, str]) -> str:
    """What a part of a batch has for one sample."""
    try:
        own = value[place]
    except Exception:  # it is not by sample
        return kind_of(value)
    if not isinstance(own, Tensor):
        return str(own)
    if own.dim() == 0 and not own.is_floating_point() and own.item() in names:
        return names[int(own)]
    numbers = [
        f"{number:.4g}" if isinstance(number, float) else str(number) for number in own.flatten()[:_FEW].tolist()
    ]
    if own.dim() == 0:
        return numbers[0]
    more = f" ... {tuple(own.shape)}" if own.numel() > _FEW else ""
    return f"{' '.join(numbers)}{more}"
