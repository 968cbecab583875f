"""The data sets: labelled images held as bytes on one device, made into normalized batches as whole tensors."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from raytorch.config import Data, StoredData
from raytorch.datasets import files
from raytorch.datasets.augmentation import Draws, windows
from raytorch.datasets.file_errors import CLASSES
from raytorch.datasets.files import Split
from raytorch.datasets.preparation import prepare
from raytorch.datasets.requests import Request

END = 10
"""Target after the last digit of a strip."""
PAD = -100
"""Target after END: the class that torch.nn.functional.cross_entropy ignores by default."""

_SEEDS: dict[Split, int] = {"train": 0, "test": 1}
_FASTEST = 3


class Moments(NamedTuple):
    """Mean and standard deviation of each channel over the training images, as shares of the brightest value."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    brightest: int = 255


# MNIST's are those of pytorch/examples; all agree with the pixels of the training split.
_DIGITS = Moments((0.3054,), (0.3760,), brightest=16)
_MNIST = Moments((0.1307,), (0.3081,))
_CIFAR10 = Moments((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


# -- data sets ---------------------------------------------------------------------------------------------------------


class Dataset:
    """Labelled images of one split, in memory on one device.

    Attributes:
        input_shape: shape of a model's input, (C, H, W), or (C, T, H, W) for clips.
        num_classes: number of classes.
        mirrors: whether inputs may be mirrored left to right without a change of their targets.
    """

    num_classes = CLASSES
    mirrors = True

    def __init__(
        self, images: Tensor, targets: Tensor, moments: Moments, input_shape: tuple[int, ...] | None = None
    ) -> None:
        """``images``: uint8 (N, C, H, W); ``targets``: int64 (N, ...); ``input_shape``: that of an image by default."""
        self._images = images
        self._targets = targets
        self.input_shape = input_shape or tuple(images.shape[1:])
        mean, std = torch.tensor([moments.mean, moments.std], device=images.device)
        per_channel = (-1, *(1 for _ in self.input_shape[1:]))
        self._scale = (1 / (std * moments.brightest)).view(per_channel)
        self._offset = (-mean / std).view(per_channel)

    def __len__(self) -> int:
        return len(self._targets)

    @property
    def device(self) -> torch.device:
        """Where the data set and its batches are."""
        return self._targets.device

    def limit(self, samples: int | None) -> None:
        """Keep the first ``samples`` only; the others stay as they are. None keeps all."""
        self._targets = self._targets[:samples]

    @property
    def labels(self) -> Tensor | None:
        """The class of each sample, int64 (N,); None if they have none."""
        return self._targets if self._targets.dim() == 1 else None

    @property
    def facts(self) -> dict[str, Any]:
        """What a model is told of the data."""
        return {"input_shape": self.input_shape, "num_classes": self.num_classes}

    def read(self, requests: Iterable[Request]) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches that are asked for, one after the other."""
        for request in requests:
            yield self.batch(request.indices, request.draws)

    def batch(self, index: Tensor, draws: Draws | None = None) -> tuple[Tensor, Tensor]:
        """Inputs, float32 (B, *input_shape), and targets, int64 (B, ...); ``index``: int64 (B,), on the same device."""
        pixels = self.pixels(index)
        return self.normalize(draws.change(pixels) if draws else pixels), self.targets(index)

    def pixels(self, index: Tensor) -> Tensor:
        """Inputs before normalization, uint8 (B, *input_shape); 0 is black."""
        return self._images.index_select(0, index)

    def targets(self, index: Tensor) -> Tensor:
        """Targets, int64 (B, ...)."""
        return self._targets.index_select(0, index)

    def normalize(self, pixels: Tensor) -> Tensor:
        """``pixels`` as float32, with about zero mean and unit variance per channel."""
        return pixels.float().mul_(self._scale).add_(self._offset)


class MovingMnist(Dataset):
    """Clips of one MNIST digit that drifts over a black canvas and bounces off its walls.

    Where digit k starts, and its velocity of 1 to 3 pixels per frame along each axis, are the same in every run.
    """

    def __init__(self, images: Tensor, labels: Tensor, split: Split, *, frames: int, canvas: int) -> None:
        """``images``: uint8 (N, 1, 28, 28); ``labels``: int64 (N,); ``canvas``: height and width in pixels."""
        super().__init__(images, labels, _MNIST, (1, frames, canvas, canvas))
        self._canvas, self._room = canvas, canvas - images.shape[-1]
        generator = torch.Generator().manual_seed(_SEEDS[split])
        size = (len(labels), 2)
        start = torch.randint(self._room + 1, size, generator=generator)
        speed = torch.randint(1, _FASTEST + 1, size, generator=generator)
        sign = torch.randint(2, size, generator=generator) * 2 - 1
        self._start, self._velocity = start.to(self.device), (speed * sign).to(self.device)

    def positions(self, index: Tensor) -> Tensor:
        """Top and left of the digit in each frame, int64 (B, T, 2), in pixels."""
        time = torch.arange(self.input_shape[1], device=self.device).view(-1, 1)
        free = self._start[index].unsqueeze(1) + self._velocity[index].unsqueeze(1) * time
        # Between two walls a path repeats after a way there and back, of which the second half is the first reversed.
        return self._room - (free % max(2 * self._room, 1) - self._room).abs()

    def pixels(self, index: Tensor) -> Tensor:
        """Clips before normalization, uint8 (B, 1, T, canvas, canvas)."""
        planes = F.pad(super().pixels(index), (self._room,) * 4).squeeze(1)
        plane = torch.arange(len(planes), device=self.device).unsqueeze(-1)
        top, left = (self._room - self.positions(index)).unbind(-1)
        return windows(planes, plane, top, left, (self._canvas, self._canvas)).unsqueeze(1)


class MnistStrips(Dataset):
    """Strips of several MNIST digits side by side, blank at the right; targets are the digits, END, then PAD.

    Which digits strip k shows is the same in every run.
    """

    mirrors = False

    def __init__(self, images: Tensor, labels: Tensor, split: Split, *, fewest: int, most: int) -> None:
        """``images``: uint8 (N, 1, 28, 28); ``labels``: int64 (N,). Makes N strips of ``fewest``..``most`` digits."""
        generator = torch.Generator().manual_seed(_SEEDS[split])
        count = len(labels)
        lengths = torch.randint(fewest, most + 1, (count, 1), generator=generator).to(labels.device)
        digits = torch.randint(count, (count, most), generator=generator).to(labels.device)
        place = torch.arange(most + 1, device=labels.device)
        targets = F.pad(labels[digits], (0, 1)).masked_fill(place == lengths, END).masked_fill(place > lengths, PAD)
        with_blank = torch.cat([images, torch.zeros_like(images[:1])])
        super().__init__(with_blank, targets, _MNIST, (1, images.shape[-2], images.shape[-1] * most))
        self._digits = digits.masked_fill(place[:-1] >= lengths, count)

    def pixels(self, index: Tensor) -> Tensor:
        """Strips before normalization, uint8 (B, 1, 28, 28 * most)."""
        digits = super().pixels(self._digits[index].view(-1))
        return digits.view(len(index), -1, *digits.shape[-2:]).transpose(1, 2).reshape(len(index), *self.input_shape)


DATASETS: dict[str, Callable[[Tensor, Tensor, Split, Any], Dataset]] = {
    "digits": lambda images, labels, split, config: Dataset(images, labels, _DIGITS),
    "mnist": lambda images, labels, split, config: Dataset(images, labels, _MNIST),
    "cifar10": lambda images, labels, split, config: Dataset(images, labels, _CIFAR10),
    "moving_mnist": lambda images, labels, split, config: MovingMnist(
        images, labels, split, frames=config.frames, canvas=config.canvas
    ),
    "mnist_strips": lambda images, labels, split, config: MnistStrips(
        images, labels, split, fewest=config.min_digits, most=config.max_digits
    ),
}
"""What makes each data set of its images, uint8 (N, C, H, W), its labels, int64 (N,), the split and its section."""


# -- loading -----------------------------------------------------------------------------------------------------------


def load_dataset(config: Data, split: Split, device: torch.device | str = "cpu") -> Dataset:
    """The split of a data set, on ``device``, downloaded first if its files are missing and ``config`` says so.

    Safe to call from all ranks at once. Raises DataError.
    """
    if isinstance(config, StoredData) and config.download:
        prepare(config)
    files.check_dataset(config)
    images, labels = files.read(config, split)
    pixels = torch.from_numpy(images).to(device)
    channels = pixels if pixels.ndim == 4 else pixels.unsqueeze(1)
    dataset = DATASETS[config.name](channels, torch.from_numpy(labels).to(device, torch.int64), split, config)
    dataset.limit(config.train_samples if split == "train" else config.test_samples)
    return dataset
