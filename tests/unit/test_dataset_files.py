"""Which files a data set has: those that are there are read exactly, what is missing or wrong is one DataError."""

import subprocess
import sys

import numpy as np
import pytest
from data_files import idx, images, refused, store, write_mnist

from raytorch.config import Cifar10Data, DigitsData, MnistData, MnistStripsData, MovingMnistData
from raytorch.datasets import files
from raytorch.errors import DataError

# -- MNIST -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_plain_and_compressed(tmp_path, suffix):
    write_mnist(tmp_path, suffix)
    files.check_dataset(MnistData(root=str(tmp_path)))
    pixels, labels = files.MnistFiles().read(tmp_path, "train")
    assert np.array_equal(pixels, images(7))
    assert labels.tolist() == list(range(7))
    assert len(files.MnistFiles().read(tmp_path, "test")[0]) == 3


def test_real_mnist(mnist_root):
    for config in (MnistData, MovingMnistData, MnistStripsData):
        files.check_dataset(config(root=str(mnist_root)))
    pixels, labels = files.MnistFiles().read(mnist_root, "train")
    assert pixels.shape == (60_000, 28, 28)
    assert labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert pixels.mean() / 255 == pytest.approx(0.1307, abs=1e-4)
    assert pixels.std() / 255 == pytest.approx(0.3081, abs=1e-4)


def test_labels_that_do_not_match_the_images(tmp_path):
    path = write_mnist(tmp_path) / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    store(path, idx(np.zeros(6, np.uint8)))
    config = MnistData(root=str(tmp_path))
    assert "7 labels, one for each image of train-images-idx3-ubyte, found 6;" in refused(
        path, lambda _: files.check_dataset(config)
    )
    store(path, idx(np.full(7, 10, np.uint8)))
    assert "labels from 0 to 9, found 10;" in refused(path, lambda _: files.MnistFiles().read(tmp_path, "train"))


@pytest.mark.parametrize("config", [MnistData, MovingMnistData, MnistStripsData, Cifar10Data])
def test_missing_files_are_named_unless_they_will_be_downloaded(tmp_path, config):
    first = {Cifar10Data: "cifar-10-batches-bin/data_batch_1.bin"}.get(config, "MNIST/raw/train-images-idx3-ubyte")
    missing = config(root=str(tmp_path))
    assert "found no readable file;" in refused(tmp_path / first, lambda _: files.check_dataset(missing))
    nowhere = config(root=str(tmp_path / "nowhere"))
    message = refused(tmp_path / "nowhere" / first, lambda _: files.check_dataset(nowhere))
    assert f"found no folder {tmp_path / 'nowhere'};" in message
    files.check_dataset(config(root=str(tmp_path), download=True))


def test_each_missing_mnist_file_is_noticed(tmp_path):
    for path in sorted((write_mnist(tmp_path) / "MNIST" / "raw").iterdir()):
        content = path.read_bytes()
        path.unlink()
        refused(path, lambda _: files.check_dataset(MnistData(root=str(tmp_path))))
        path.write_bytes(content)


def test_a_corrupt_file_is_refused_even_if_download_is_on(tmp_path):
    path = write_mnist(tmp_path) / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    assert "delete it and" in refused(path, lambda _: files.check_dataset(MnistData(root=str(tmp_path), download=True)))


def test_root_of_an_unknown_user():
    with pytest.raises(DataError, match=r"data\.root: expected a folder, found ~no-such-user-here/data"):
        files.check_dataset(MnistData(root="~no-such-user-here/data"))


def test_check_imports_no_torch(tmp_path):
    write_mnist(tmp_path)
    script = (
        "import sys; from raytorch.config import MnistData, DigitsData; from raytorch.datasets import check_dataset;"
        f"check_dataset(MnistData(root={str(tmp_path)!r})); check_dataset(DigitsData());"
        "assert not {'torch', 'torchvision', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# -- digits ------------------------------------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    files.check_dataset(DigitsData())
    pixels, labels = files.DigitsFiles().read_all(files.DIGITS.parent)
    bunch = load_digits()
    assert np.array_equal(pixels, bunch.images)
    assert np.array_equal(labels, bunch.target)


@pytest.mark.parametrize("content", [None, b"", b"1,2,3", b"\x1f\x8b cut off"])
def test_damaged_digits(tmp_path, monkeypatch, content):
    path = tmp_path / "digits.csv.gz"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(files, "DIGITS", path)
    with pytest.raises(DataError, match="digits that raytorch brings along"):
        files.DigitsFiles().read_all(files.DIGITS.parent)
