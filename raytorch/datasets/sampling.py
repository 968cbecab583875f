"""What a split says of its samples, by which they are drawn or shuffled."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from raytorch.config.data import Sampling
from raytorch.datasets.requests import Split
from raytorch.errors import ConfigError


def drawing_weights(sampling: Sampling, split: Split) -> Tensor | None:
    """In proportion to what its samples are drawn, float64 (N,); None if an epoch has each of them once.

    Raises ConfigError if the split does not tell what is needed, as ``labels`` or ``weights``.
    """
    if sampling == "each":
        return None
    return _of_classes(split) if sampling == "balanced" else _of_samples(split)


def blocks_of(split: Split) -> Tensor:
    """Samples of each block of those that lie together, int64 (M,).

    Raises ConfigError if the split does not tell, as ``blocks``.
    """
    told: Any = getattr(split, "blocks", None)
    what = f"the number of samples in each, in their order, {len(split):,} in all"
    if told is None:
        raise ConfigError(f"shuffle: blocks goes by blocks, {what}; let the data set have them, or leave shuffle out")
    try:
        blocks = torch.as_tensor(told).detach().cpu()
        is_right = blocks.dim() == 1 and not blocks.is_floating_point() and not blocks.is_complex()
        is_right = is_right and bool((blocks >= 1).all()) and int(blocks.sum()) == len(split)
    except (TypeError, ValueError, RuntimeError):
        is_right = False
    if not is_right:
        raise ConfigError(f"shuffle: blocks goes by blocks, {what}: here they are {told!r:.60}")
    return blocks.to(torch.int64)


def number_of_each(split: Split, name: str) -> Tensor | None:
    """What a split says of its samples, on the CPU; None if that is not one number for each."""
    return _numbers(getattr(split, name, None), len(split))


class Labels(NamedTuple):
    """The classes of samples."""

    numbers: Tensor
    """Whole numbers (N,)."""
    are_known: Tensor
    """bool (N,): those of which it is false may have any number."""


def labels_of(split: Split) -> Labels | None:
    """The classes of a split's samples, of which a masked array has those that are known; None if it has none."""
    told: Any = getattr(split, "labels", None)
    numbers = _numbers(np.ma.getdata(told) if isinstance(told, np.ma.MaskedArray) else told, len(split))
    if numbers is None or numbers.is_floating_point() or numbers.is_complex():
        return None
    are_known = torch.ones(len(split), dtype=torch.bool)
    return Labels(
        numbers, are_known & ~torch.from_numpy(np.ma.getmaskarray(told)) if np.ma.is_masked(told) else are_known
    )


def _numbers(told: Any, count: int) -> Tensor | None:
    try:
        numbers = torch.as_tensor(told).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        return None
    return numbers if numbers.shape == (count,) else None


def _of_classes(split: Split) -> Tensor:
    """So that all classes are equally likely, without the samples whose class is not known."""
    labels = labels_of(split)
    if labels is None or not labels.are_known.any():
        raise _refusal("balanced", split, "labels", "a whole number for each of its training samples")
    _, place, counts = torch.unique(labels.numbers[labels.are_known], return_inverse=True, return_counts=True)
    likely = torch.zeros(len(split), dtype=torch.float64)
    likely[labels.are_known] = 1 / counts.double()[place]
    return likely


def _of_samples(split: Split) -> Tensor:
    weights = number_of_each(split, "weights")
    what = "a finite number of at least 0, and not 0 of all, for each of its training samples"
    if weights is None or weights.is_complex():
        raise _refusal("weighted", split, "weights", what)
    weights = weights.double()
    if not (weights.isfinite().all() and (weights >= 0).all() and 0 < float(weights.sum()) < float("inf")):
        raise _refusal("weighted", split, "weights", what)
    return weights


def _refusal(sampling: str, split: Split, name: str, what: str) -> ConfigError:
    return ConfigError(f"sampling: {sampling} draws by {name}, {what}; let the data set have them{_found(split, name)}")


def _found(split: Split, name: str) -> str:
    told: Any = getattr(split, name, None)
    if told is None:
        return ""
    try:
        numbers = torch.as_tensor(told)
    except (TypeError, ValueError, RuntimeError):
        return f": here they are {told!r:.60}"
    if numbers.shape != (len(split),):
        return f": here they are of shape {tuple(numbers.shape)} for {len(split)} samples"
    span = "" if numbers.is_complex() else f", from {numbers.min():g} to {numbers.max():g}"
    return f": here they are of {str(numbers.dtype).removeprefix('torch.')}{span}"
