"""Data sets against references that go sample by sample, pixel by pixel, through plain numpy."""

from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import idx

from raytorch.config import Cifar10Data, DigitsData, MnistData, MnistStripsData, MovingMnistData
from raytorch.datasets import END, PAD, load_dataset
from raytorch.datasets.augmentation import mirror, shift
from raytorch.datasets.files import DIGITS, DigitsFiles
from raytorch.errors import DataError

TRAIN, TEST = 40, 12


def write_mnist(root: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Random images (of no black pixel) and labels in MNIST's files, which are returned by split."""
    random = np.random.default_rng(0)
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    splits = {}
    for split, prefix, count in (("train", "train", TRAIN), ("test", "t10k", TEST)):
        images, labels = random.integers(1, 256, (count, 28, 28), np.uint8), random.integers(0, 10, count, np.uint8)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(labels))
        splits[split] = images, labels
    return splits


@pytest.fixture
def mnist(tmp_path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return write_mnist(tmp_path)


# -- images ------------------------------------------------------------------------------------------------------------


def test_digits_are_split_without_overlap():
    train, test = (load_dataset(DigitsData(), split) for split in ("train", "test"))
    assert (len(train), len(test)) == (DigitsData.train_size, 297)
    assert train.input_shape == DigitsData().input_shape == (1, 8, 8)
    assert train.num_classes == 10
    pixels = torch.cat([split.pixels(torch.arange(len(split))) for split in (train, test)])
    assert pixels.max() == 16
    everything, _ = DigitsFiles().read_all(DIGITS.parent)
    assert sorted(map(bytes, pixels.numpy())) == sorted(map(bytes, everything))
    assert all((test.targets(torch.arange(297)) == digit).sum() > 20 for digit in range(10))


@pytest.mark.parametrize("split", ["train", "test"])
def test_mnist_batch(tmp_path, mnist, split):
    images, labels = mnist[split]
    dataset = load_dataset(MnistData(root=str(tmp_path)), split)
    assert len(dataset) == len(images)
    assert dataset.input_shape == MnistData().input_shape == (1, 28, 28)
    index = torch.tensor([3, 0, 3, 11])
    inputs, targets = dataset.batch(index)
    assert inputs.dtype == torch.float32
    assert targets.dtype == torch.int64
    assert targets.tolist() == labels[index].tolist()
    expected = (images[index][:, None] / 255 - 0.1307) / 0.3081
    torch.testing.assert_close(inputs, torch.tensor(expected, dtype=torch.float32))


def test_batches_share_no_memory_with_the_data_set(tmp_path, mnist):
    dataset = load_dataset(MnistData(root=str(tmp_path)), "train")
    before = dataset.batch(torch.arange(4))[0].clone()
    dataset.batch(torch.arange(4))[0].zero_()
    assert torch.equal(dataset.batch(torch.arange(4))[0], before)


def test_inputs_have_zero_mean_and_unit_variance(mnist_root):
    for config in (DigitsData(), MnistData(root=str(mnist_root))):
        dataset = load_dataset(config, "train")
        assert len(dataset) == config.train_size
        inputs, _ = dataset.batch(torch.arange(len(dataset)))
        assert inputs.mean().item() == pytest.approx(0, abs=1e-3)
        assert inputs.std().item() == pytest.approx(1, abs=1e-3)


def test_cifar10_normalizes_each_channel(tmp_path):
    rows = np.random.default_rng(0).integers(0, 10, (10_000, 3073), np.uint8)
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    rows.tofile(folder / "test_batch.bin")
    for number in range(1, 6):
        (folder / f"data_batch_{number}.bin").symlink_to(folder / "test_batch.bin")
    dataset = load_dataset(Cifar10Data(root=str(tmp_path), test_samples=7), "test")
    assert len(dataset) == 7
    assert dataset.input_shape == Cifar10Data().input_shape == (3, 32, 32)
    inputs, targets = dataset.batch(torch.tensor([6, 2]))
    assert targets.tolist() == rows[[6, 2], 0].tolist()
    image = rows[[6, 2], 1:].reshape(-1, 3, 32, 32) / 255
    for channel, (mean, std) in enumerate(zip((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), strict=True)):
        expected = torch.tensor((image[:, channel] - mean) / std, dtype=torch.float32)
        torch.testing.assert_close(inputs[:, channel], expected)


@pytest.mark.parametrize("config", [MnistData, MovingMnistData, MnistStripsData])
def test_limits_leave_the_samples_as_they_are(tmp_path, mnist, config):
    everything = load_dataset(config(root=str(tmp_path)), "train")
    few = load_dataset(config(root=str(tmp_path), train_samples=5, test_samples=1), "train")
    assert len(everything) == TRAIN
    assert len(few) == 5
    index = torch.arange(5)
    assert all(torch.equal(a, b) for a, b in zip(few.batch(index), everything.batch(index), strict=True))
    assert len(load_dataset(config(root=str(tmp_path), train_samples=5), "test")) == TEST


def test_corrupt_files_are_refused(tmp_path, mnist):
    path = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=path.name):
        load_dataset(MnistData(root=str(tmp_path)), "test")


# -- clips -------------------------------------------------------------------------------------------------------------


def walk(start: int, velocity: int, steps: int, room: int) -> list[int]:
    """A path between walls at 0 and ``room``, a pixel at a time."""
    path, position, direction = [start], start, 1 if velocity > 0 else -1
    for _ in range(steps - 1):
        for _ in range(abs(velocity)):
            if not 0 <= position + direction <= room:
                direction = -direction
            position += direction
        path.append(position)
    return path


@pytest.mark.parametrize(("frames", "canvas"), [(6, 36), (30, 29), (2, 60)])
def test_clips_show_a_digit_that_moves_and_bounces(tmp_path, mnist, frames, canvas):
    images, labels = mnist["train"]
    config = MovingMnistData(root=str(tmp_path), frames=frames, canvas=canvas)
    dataset = load_dataset(config, "train")
    assert dataset.input_shape == config.input_shape == (1, frames, canvas, canvas)
    index = torch.arange(TRAIN).flip(0)
    clips, positions = dataset.pixels(index), dataset.positions(index)
    assert clips.dtype == torch.uint8
    assert dataset.targets(index).tolist() == labels[::-1].tolist()
    for sample, clip, path in zip(index.tolist(), clips, positions.tolist(), strict=True):
        expected = np.zeros((1, frames, canvas, canvas), np.uint8)
        for frame, (top, left) in enumerate(path):
            expected[0, frame, top : top + 28, left : left + 28] = images[sample]
        assert np.array_equal(clip, expected)
        for axis in zip(*path, strict=True):
            possible = [walk(axis[0], velocity, frames, canvas - 28) for velocity in (-3, -2, -1, 1, 2, 3)]
            assert list(axis) in possible


def test_clips_on_a_canvas_without_room_stand_still(tmp_path, mnist):
    dataset = load_dataset(MovingMnistData(root=str(tmp_path), canvas=28), "train")
    assert not dataset.positions(torch.arange(TRAIN)).any()
    assert np.array_equal(dataset.pixels(torch.arange(TRAIN))[:, 0, 3], mnist["train"][0])


def test_clips_are_the_same_in_every_run_but_differ_between_samples_and_splits(tmp_path, mnist):
    config = MovingMnistData(root=str(tmp_path))
    index = torch.arange(TEST)
    train, again, test = (load_dataset(config, split).positions(index) for split in ("train", "train", "test"))
    assert torch.equal(train, again)
    assert not torch.equal(train, test)
    assert len({tuple(path.flatten().tolist()) for path in train}) > TEST // 2


# -- strips ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fewest", "most"), [(2, 4), (1, 1), (3, 3)])
@pytest.mark.parametrize("split", ["train", "test"])
def test_strips_show_the_digits_that_their_targets_name(tmp_path, mnist, split, fewest, most):
    images, labels = mnist[split]
    label_of = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    config = MnistStripsData(root=str(tmp_path), min_digits=fewest, max_digits=most)
    dataset = load_dataset(config, split)
    assert len(dataset) == len(images)
    assert dataset.input_shape == config.input_shape == (1, 28, 28 * most)
    assert dataset.num_classes == 10
    strips, targets = dataset.pixels(torch.arange(len(dataset))), dataset.targets(torch.arange(len(dataset)))
    assert strips.shape == (len(images), *dataset.input_shape)
    assert targets.shape == (len(images), most + 1)
    assert targets.dtype == torch.int64
    lengths = set()
    for strip, target in zip(strips[:, 0].numpy(), targets.tolist(), strict=True):
        squares = [strip[:, left : left + 28] for left in range(0, 28 * most, 28)]
        shown = [square for square in squares if square.any()]
        assert not any(square.any() for square in squares[len(shown) :])
        digits = [label_of[square.tobytes()] for square in shown]
        assert target == [*digits, END, *[PAD] * (most - len(digits))]
        lengths.add(len(digits))
    assert lengths == set(range(fewest, most + 1))


def test_strips_are_the_same_in_every_run_but_differ_between_splits(tmp_path, mnist):
    config = MnistStripsData(root=str(tmp_path))
    index = torch.arange(TEST)
    train, again, test = (load_dataset(config, split).targets(index) for split in ("train", "train", "test"))
    assert torch.equal(train, again)
    assert not torch.equal(train, test)


# -- operations on pixels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 1, 28, 28), (9, 3, 7, 5), (9, 2, 4, 6, 5)], ids=["grey", "colour", "clip"])
def test_shift_pads_and_crops_each_sample(shape):
    padding = 3
    pixels = torch.randint(1, 256, shape, dtype=torch.uint8)
    offset = torch.randint(2 * padding + 1, (9, 2))
    shifted = shift(pixels, offset, padding)
    *_, height, width = shape
    for sample, (top, left), result in zip(pixels, offset.tolist(), shifted, strict=True):
        padded = torch.nn.functional.pad(sample, (padding,) * 4)
        assert torch.equal(result, padded[..., top : top + height, left : left + width])


@pytest.mark.parametrize("shape", [(9, 3, 7, 5), (9, 2, 4, 6, 5)], ids=["image", "clip"])
def test_mirror_flips_the_chosen_samples(shape):
    pixels = torch.randint(256, shape, dtype=torch.uint8)
    before = pixels.clone()
    chosen = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0, 0], dtype=torch.uint8)
    for sample, choice, result in zip(before, chosen, mirror(pixels, chosen), strict=True):
        assert torch.equal(result, sample.flip(-1) if choice else sample)
    assert torch.equal(pixels, before)
