"""Reading data files: what is right comes back exactly, what is wrong is one DataError, and nothing in a file runs."""

import gzip
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from raytorch.config import Cifar10Data, DigitsData, MnistData, MnistStripsData, MovingMnistData
from raytorch.datasets import files, formats
from raytorch.datasets.formats import IdxFormat
from raytorch.errors import DataError

IMAGES = IdxFormat("images", (28, 28), 60_000)
LABELS = IdxFormat("labels", (), 60_000)


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def images(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 28, 28), np.uint8)


def store(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return path


def refused(path: Path, read, *arguments) -> str:
    """The message of the one error that reading ``path`` raises, which has to help."""
    with pytest.raises(DataError) as caught:
        read(path, *arguments)
    message = str(caught.value)
    assert message.startswith(f"{path}: expected ")
    assert ", found " in message
    assert "data.download=true" in message
    assert "\n" not in message
    return message


def write_mnist(root: Path, suffix: str = "", train: int = 7, test: int = 3) -> Path:
    for prefix, count in (("train", train), ("t10k", test)):
        store(root / "MNIST" / "raw" / f"{prefix}-images-idx3-ubyte{suffix}", idx(images(count)))
        labels = np.arange(count, dtype=np.uint8) % 10
        store(root / "MNIST" / "raw" / f"{prefix}-labels-idx1-ubyte{suffix}", idx(labels))
    return root


# -- IDX ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_round_trip(tmp_path, suffix):
    array = images(5)
    path = store(tmp_path / f"images{suffix}", idx(array))
    read = formats.read_idx(path, IMAGES)
    assert read.dtype == np.uint8
    assert read.flags.writeable
    assert np.array_equal(read, array)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("length", range(16))
def test_header_cut_short_at_every_byte(tmp_path, suffix, length):
    path = store(tmp_path / f"images{suffix}", idx(images(2))[:length])
    for read in (formats.read_idx, formats.check_idx):
        assert f"a header of 16 bytes, found {length};" in refused(path, read, IMAGES)


def test_gzip_cut_short_at_every_byte(tmp_path):
    path = store(tmp_path / "labels.gz", idx(np.arange(10, dtype=np.uint8)))
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refused(path, formats.read_idx, LABELS)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("change", [slice(0, -1), slice(0, 16)], ids=["last byte", "all data"])
def test_data_cut_short(tmp_path, suffix, change):
    refused(store(tmp_path / f"images{suffix}", idx(images(2))[change]), formats.read_idx, IMAGES)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_bytes_after_the_data(tmp_path, suffix):
    refused(store(tmp_path / f"images{suffix}", idx(images(2)) + b"\0"), formats.read_idx, IMAGES)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("magic", ["00000801", "00000804", "00000903", "01000803", "1f8b0800", "ffffffff"])
def test_wrong_magic(tmp_path, suffix, magic):
    path = store(tmp_path / f"images{suffix}", bytes.fromhex(magic) + idx(images(2))[4:])
    assert f"magic bytes 00000803 (IDX of images), found {magic};" in refused(path, formats.check_idx, IMAGES)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    "sizes", [(0, 28, 28), (60_001, 28, 28), (2**31, 28, 28), (2**32 - 1, 28, 28), (2, 2**32 - 1, 28), (2, 28, 0)]
)
def test_impossible_sizes_allocate_nothing(tmp_path, suffix, sizes):
    path = store(tmp_path / f"images{suffix}", IMAGES.magic + struct.pack(">3I", *sizes) + bytes(2 * 28 * 28))
    tracemalloc.start()
    refused(path, formats.read_idx, IMAGES)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


def test_plain_size_is_checked_before_its_claim_is_allocated(tmp_path):
    path = store(tmp_path / "images", IMAGES.magic + struct.pack(">3I", 60_000, 28, 28) + bytes(28 * 28))
    tracemalloc.start()
    assert "47,040,016 bytes for 60,000 images, found 800;" in refused(path, formats.read_idx, IMAGES)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


def test_gzip_bomb_is_not_inflated(tmp_path):
    path = store(tmp_path / "images.gz", idx(images(1)) + bytes(2**26))
    tracemalloc.start()
    assert "784 bytes after the header for 1 images, found more than 784;" in refused(path, formats.read_idx, IMAGES)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize("position", [1, 12, -5, -1], ids=["magic", "data", "checksum", "length"])
def test_damaged_gzip(tmp_path, position):
    path = store(tmp_path / "labels.gz", idx(np.arange(10, dtype=np.uint8)))
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)
    refused(path, formats.read_idx, LABELS)


def test_folder_in_place_of_a_file(tmp_path):
    refused(tmp_path, formats.read_idx, IMAGES)


# -- MNIST -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_plain_and_compressed(tmp_path, suffix):
    write_mnist(tmp_path, suffix)
    files.check(MnistData(root=str(tmp_path)))
    pixels, labels = files.read_mnist(tmp_path, "train")
    assert np.array_equal(pixels, images(7))
    assert labels.tolist() == list(range(7))
    assert len(files.read_mnist(tmp_path, "test")[0]) == 3


def test_real_mnist(mnist_root):
    for config in (MnistData, MovingMnistData, MnistStripsData):
        files.check(config(root=str(mnist_root)))
    pixels, labels = files.read_mnist(mnist_root, "train")
    assert pixels.shape == (60_000, 28, 28)
    assert labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert pixels.mean() / 255 == pytest.approx(0.1307, abs=1e-4)
    assert pixels.std() / 255 == pytest.approx(0.3081, abs=1e-4)


def test_labels_that_do_not_match_the_images(tmp_path):
    path = write_mnist(tmp_path) / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    store(path, idx(np.zeros(6, np.uint8)))
    config = MnistData(root=str(tmp_path))
    assert "7 labels, one for each image of train-images-idx3-ubyte, found 6;" in refused(
        path, lambda _: files.check(config)
    )
    store(path, idx(np.full(7, 10, np.uint8)))
    assert "labels from 0 to 9, found 10;" in refused(path, lambda _: files.read_mnist(tmp_path, "train"))


@pytest.mark.parametrize("config", [MnistData, MovingMnistData, MnistStripsData, Cifar10Data])
def test_missing_files_are_named_unless_they_will_be_downloaded(tmp_path, config):
    first = {Cifar10Data: "cifar-10-batches-bin/data_batch_1.bin"}.get(config, "MNIST/raw/train-images-idx3-ubyte")
    missing = config(root=str(tmp_path))
    assert "found no readable file;" in refused(tmp_path / first, lambda _: files.check(missing))
    nowhere = config(root=str(tmp_path / "nowhere"))
    message = refused(tmp_path / "nowhere" / first, lambda _: files.check(nowhere))
    assert f"found no folder {tmp_path / 'nowhere'};" in message
    files.check(config(root=str(tmp_path), download=True))


def test_each_missing_mnist_file_is_noticed(tmp_path):
    for path in sorted((write_mnist(tmp_path) / "MNIST" / "raw").iterdir()):
        content = path.read_bytes()
        path.unlink()
        refused(path, lambda _: files.check(MnistData(root=str(tmp_path))))
        path.write_bytes(content)


def test_a_corrupt_file_is_refused_even_if_download_is_on(tmp_path):
    path = write_mnist(tmp_path) / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    assert "delete it and" in refused(path, lambda _: files.check(MnistData(root=str(tmp_path), download=True)))


def test_root_of_an_unknown_user():
    with pytest.raises(DataError, match=r"data\.root: expected a folder, found ~no-such-user-here/data"):
        files.check(MnistData(root="~no-such-user-here/data"))


def test_check_imports_no_torch(tmp_path):
    write_mnist(tmp_path)
    script = (
        "import sys; from raytorch.config import MnistData, DigitsData; from raytorch.datasets import check;"
        f"check(MnistData(root={str(tmp_path)!r})); check(DigitsData());"
        "assert not {'torch', 'torchvision', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# -- digits ------------------------------------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    files.check(DigitsData())
    pixels, labels = files.read_digits()
    bunch = load_digits()
    assert np.array_equal(pixels, bunch.images)
    assert np.array_equal(labels, bunch.target)


# -- CIFAR-10 ----------------------------------------------------------------------------------------------------------

ROWS, PIXELS = 10_000, 3072


@pytest.fixture(scope="module")
def batch() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.integers(0, 256, (ROWS, PIXELS), np.uint8), random.integers(0, 10, ROWS, np.uint8)


def binary(pixels: np.ndarray, labels: np.ndarray) -> bytes:
    return np.concatenate([labels[:, None], pixels], axis=1).tobytes()


def python2_pickle(pixels: np.ndarray, labels: np.ndarray) -> bytes:
    """The bytes that Python 2 and its numpy wrote: protocol 2, text as BINSTRING, the array by _reconstruct."""
    listed = b"".join(b"K" + bytes([label]) for label in labels)
    return (
        b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x15training batch 1 of 5q\x03U\x06labelsq\x04]q\x05(" + listed + b"e"
        b"U\x04dataq\x06cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85U\x01b\x87Rq\x09"
        b"(K\x01M\x10\x27M\x00\x0c\x86cnumpy\ndtype\nq\x0aU\x02u1K\x00K\x01\x87Rq\x0b"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"T" + struct.pack("<i", pixels.size) + pixels.tobytes() + b"tbu."
    )


def test_python2_pickle_is_a_faithful_sample(batch):
    loaded = pickle.loads(python2_pickle(*batch), encoding="bytes")
    assert np.array_equal(loaded[b"data"], batch[0])
    assert loaded[b"labels"] == batch[1].tolist()


@pytest.mark.parametrize("layout", ["binary", "python 2", "python 3", "python 3, by columns"])
def test_cifar10_layouts(tmp_path, batch, layout):
    pixels, labels = batch
    if layout == "binary":
        path = store(tmp_path / "data_batch_1.bin", binary(pixels, labels))
    elif layout == "python 2":
        path = store(tmp_path / "data_batch_1", python2_pickle(pixels, labels))
    else:
        data = np.asfortranarray(pixels) if "columns" in layout else pixels
        path = store(tmp_path / "data_batch_1", pickle.dumps({"data": data, "labels": labels.tolist()}, protocol=4))
    read_pixels, read_labels = formats.read_cifar10_batch(path)
    assert np.array_equal(read_pixels, pixels.reshape(-1, 3, 32, 32))
    assert np.array_equal(read_labels, labels)


@pytest.mark.parametrize("layout", ["bin", "py"])
def test_cifar10_splits(tmp_path, batch, layout):
    folder, suffix = tmp_path / f"cifar-10-batches-{layout}", ".bin" if layout == "bin" else ""
    content = (binary if layout == "bin" else python2_pickle)(*batch)
    first = store(folder / f"data_batch_1{suffix}", content)
    for name in ("data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        refused(folder / f"{name}{suffix}", lambda _: files.check(Cifar10Data(root=str(tmp_path))))
        (folder / f"{name}{suffix}").symlink_to(first)
    files.check(Cifar10Data(root=str(tmp_path)))
    assert files.read_cifar10(tmp_path, "test")[0].shape == (10_000, 3, 32, 32)
    pixels, labels = files.read_cifar10(tmp_path, "train")
    assert pixels.shape == (50_000, 3, 32, 32)
    assert np.array_equal(labels, np.tile(batch[1], 5))


@pytest.fixture
def any_size(monkeypatch) -> None:
    """Lets a test write a small pickle, which the check of its size would refuse."""
    monkeypatch.setattr(formats, "_PYTHON_BYTES", range(2**25))


@pytest.mark.parametrize("name", ["data_batch_1.bin", "data_batch_1"])
@pytest.mark.parametrize("size", [0, 1, ROWS * PIXELS - 1, 30_730_000 - 1, 30_730_000 + 1, 32_000_001])
def test_cifar10_wrong_size(tmp_path, name, size):
    path = tmp_path / name
    with path.open("wb") as stream:
        stream.truncate(size)
    for read in (formats.check_cifar10_batch, formats.read_cifar10_batch):
        refused(path, read)


def test_cifar10_labels_out_of_range(tmp_path, batch):
    pixels, labels = batch[0], batch[1].copy()
    labels[77] = 10
    for name, write in (("batch.bin", binary), ("batch", python2_pickle)):
        assert "labels from 0 to 9, found 10;" in refused(
            store(tmp_path / name, write(pixels, labels)), formats.read_cifar10_batch
        )


@pytest.mark.parametrize(
    "fields",
    [
        {"labels": [0] * ROWS},
        {"data": np.zeros((ROWS, PIXELS), np.uint8)},
        {"data": np.zeros((ROWS, PIXELS), np.uint8), "labels": [0] * (ROWS - 1)},
        {"data": np.zeros((ROWS, PIXELS), np.uint8), "labels": [0.0] * ROWS},
        {"data": np.zeros((ROWS, PIXELS), np.uint8), "labels": [-1] * ROWS},
        {"data": np.zeros((ROWS, PIXELS), np.uint8), "labels": [256] * ROWS},
        {"data": np.zeros((ROWS, PIXELS), np.int8), "labels": [0] * ROWS},
        {"data": np.zeros((PIXELS, ROWS), np.uint8), "labels": [0] * ROWS},
        {"data": [0] * ROWS, "labels": [0] * ROWS},
        [0],
    ],
)
def test_pickles_of_other_things(tmp_path, any_size, fields):
    refused(store(tmp_path / "data_batch_1", pickle.dumps(fields, protocol=4)), formats.read_cifar10_batch)


def test_pickle_cut_short(tmp_path, any_size, batch):
    whole = python2_pickle(*batch)
    path = store(tmp_path / "data_batch_1", whole[:-1])
    assert "a pickle, which ends in a full stop" in refused(path, formats.check_cifar10_batch)
    for length in (*range(200), 20_000, len(whole) - 2):
        store(path, whole[:length] + b".")
        refused(path, formats.read_cifar10_batch)


MALICIOUS = {
    "global and reduce": b"cos\nsystem\n(V{command}\ntR.",
    "posix": b"cposix\nsystem\n(V{command}\ntR.",
    "stack global": b"\x8c\x02os\x8c\x06system\x93\x8c{length}{command}\x85R.",
    "inst": b"(V{command}\nios\nsystem\n.",
    "obj": b"(cos\nsystem\nV{command}\no.",
    "newobj": b"csubprocess\nPopen\n(]V/bin/sh\naV-c\naV{command}\natR.",
    "eval": b"cbuiltins\neval\n(V__import__('os').system({quoted})\ntR.",
    "dotted name": b"\x8c\x05numpy\x8c\x0dndarray.tobytes\x93.",
    "through numpy": b"cnumpy.core.multiarray\n_reconstruct\ncos\nsystem\nK\x00\x85U\x01b\x87R.",
    "within an array's state": b"cnumpy\ndtype\n)R(cos\nsystem\n(V{command}\ntRtb.",
    "state of the stand-in": b"cnumpy\ndtype\n}V__setstate__\ncos\nsystem\nsb.",
    "extension": b"\x82\x01.",
    "persistent id": b"Vos.system\nQ.",
}


@pytest.mark.parametrize("name", MALICIOUS)
def test_hostile_pickle_runs_nothing(tmp_path, any_size, name):
    marker = tmp_path / "ran"
    path = store(tmp_path / "data_batch_1", malicious(name, marker))
    refused(path, formats.read_cifar10_batch)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["global and reduce", "stack global", "inst", "obj", "eval"])
def test_those_pickles_would_run_if_they_were_trusted(tmp_path, name):
    marker = tmp_path / "ran"
    pickle.loads(malicious(name, marker))
    assert marker.exists()


def malicious(name: str, marker: Path) -> bytes:
    command = f"touch {os.fspath(marker)}"
    parts = {b"{command}": command.encode(), b"{quoted}": repr(command).encode(), b"{length}": bytes([len(command)])}
    stream = MALICIOUS[name]
    for part, value in parts.items():
        stream = stream.replace(part, value)
    return stream


@pytest.mark.parametrize(
    "stream",
    [
        b"\x96" + struct.pack("<Q", 2**36) + b".",  # BYTEARRAY8
        b"\x8e" + struct.pack("<Q", 2**36) + b".",  # BINBYTES8
        b"\x8d" + struct.pack("<Q", 2**36) + b".",  # BINUNICODE8
        b"\x8b" + struct.pack("<i", 2**31 - 1) + b".",  # LONG4
        b"Nr" + struct.pack("<I", 2**32 - 1) + b".",  # LONG_BINPUT
        b"\x95" + struct.pack("<Q", 2**36) + b"N.",  # FRAME
    ],
)
def test_sizes_claimed_in_a_pickle_are_not_allocated(tmp_path, any_size, stream):
    path = store(tmp_path / "data_batch_1", b"\x80\x05" + stream)
    tracemalloc.start()
    refused(path, formats.read_cifar10_batch)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20
