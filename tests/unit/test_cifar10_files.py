"""Batches of CIFAR-10: every layout comes back exactly, what is wrong is one DataError, nothing in a pickle runs."""

import os
import pickle
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from data_files import PIXELS, ROWS, binary, python2_pickle, refused, store

from raytorch.config import Cifar10Data
from raytorch.datasets import cifar10_files, files


@pytest.fixture(scope="module")
def batch() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.integers(0, 256, (ROWS, PIXELS), np.uint8), random.integers(0, 10, ROWS, np.uint8)


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
    read_pixels, read_labels = cifar10_files.read_cifar10_batch(path)
    assert np.array_equal(read_pixels, pixels.reshape(-1, 3, 32, 32))
    assert np.array_equal(read_labels, labels)


@pytest.mark.parametrize("layout", ["bin", "py"])
def test_cifar10_splits(tmp_path, batch, layout):
    folder, suffix = tmp_path / f"cifar-10-batches-{layout}", ".bin" if layout == "bin" else ""
    content = (binary if layout == "bin" else python2_pickle)(*batch)
    first = store(folder / f"data_batch_1{suffix}", content)
    for name in ("data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        refused(folder / f"{name}{suffix}", lambda _: files.check_dataset(Cifar10Data(root=str(tmp_path))))
        (folder / f"{name}{suffix}").symlink_to(first)
    files.check_dataset(Cifar10Data(root=str(tmp_path)))
    assert files.Cifar10Files().read(tmp_path, "test")[0].shape == (10_000, 3, 32, 32)
    pixels, labels = files.Cifar10Files().read(tmp_path, "train")
    assert pixels.shape == (50_000, 3, 32, 32)
    assert np.array_equal(labels, np.tile(batch[1], 5))


@pytest.fixture
def any_size(monkeypatch) -> None:
    """Lets a test write a small pickle, which the check of its size would refuse."""
    monkeypatch.setattr(cifar10_files, "_PYTHON_BYTES", range(2**25))


@pytest.mark.parametrize("name", ["data_batch_1.bin", "data_batch_1"])
@pytest.mark.parametrize("size", [0, 1, ROWS * PIXELS - 1, 30_730_000 - 1, 30_730_000 + 1, 32_000_001])
def test_cifar10_wrong_size(tmp_path, name, size):
    path = tmp_path / name
    with path.open("wb") as stream:
        stream.truncate(size)
    for read in (cifar10_files.check_cifar10_batch, cifar10_files.read_cifar10_batch):
        refused(path, read)


def test_cifar10_labels_out_of_range(tmp_path, batch):
    pixels, labels = batch[0], batch[1].copy()
    labels[77] = 10
    for name, write in (("batch.bin", binary), ("batch", python2_pickle)):
        assert "labels from 0 to 9, found 10;" in refused(
            store(tmp_path / name, write(pixels, labels)), cifar10_files.read_cifar10_batch
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
    refused(store(tmp_path / "data_batch_1", pickle.dumps(fields, protocol=4)), cifar10_files.read_cifar10_batch)


def test_pickle_cut_short(tmp_path, any_size, batch):
    whole = python2_pickle(*batch)
    path = store(tmp_path / "data_batch_1", whole[:-1])
    assert "a pickle, which ends in a full stop" in refused(path, cifar10_files.check_cifar10_batch)
    for length in (*range(200), 20_000, len(whole) - 2):
        store(path, whole[:length] + b".")
        refused(path, cifar10_files.read_cifar10_batch)


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
    refused(path, cifar10_files.read_cifar10_batch)
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
    refused(path, cifar10_files.read_cifar10_batch)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20
