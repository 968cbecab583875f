"""IDX files: what is right comes back exactly, what is wrong is one DataError and costs no memory."""

import struct
import tracemalloc

import numpy as np
import pytest
from data_files import idx, images, refused, store

from raytorch.datasets import idx_files
from raytorch.datasets.idx_files import IdxFormat

IMAGES = IdxFormat("images", (28, 28), 60_000)
LABELS = IdxFormat("labels", (), 60_000)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_round_trip(tmp_path, suffix):
    array = images(5)
    path = store(tmp_path / f"images{suffix}", idx(array))
    read = idx_files.read_idx(path, IMAGES)
    assert read.dtype == np.uint8
    assert read.flags.writeable
    assert np.array_equal(read, array)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("length", range(16))
def test_header_cut_short_at_every_byte(tmp_path, suffix, length):
    path = store(tmp_path / f"images{suffix}", idx(images(2))[:length])
    for read in (idx_files.read_idx, idx_files.check_idx):
        assert f"a header of 16 bytes, found {length};" in refused(path, read, IMAGES)


def test_gzip_cut_short_at_every_byte(tmp_path):
    path = store(tmp_path / "labels.gz", idx(np.arange(10, dtype=np.uint8)))
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refused(path, idx_files.read_idx, LABELS)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("change", [slice(0, -1), slice(0, 16)], ids=["last byte", "all data"])
def test_data_cut_short(tmp_path, suffix, change):
    refused(store(tmp_path / f"images{suffix}", idx(images(2))[change]), idx_files.read_idx, IMAGES)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_bytes_after_the_data(tmp_path, suffix):
    refused(store(tmp_path / f"images{suffix}", idx(images(2)) + b"\0"), idx_files.read_idx, IMAGES)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("magic", ["00000801", "00000804", "00000903", "01000803", "1f8b0800", "ffffffff"])
def test_wrong_magic(tmp_path, suffix, magic):
    path = store(tmp_path / f"images{suffix}", bytes.fromhex(magic) + idx(images(2))[4:])
    assert f"magic bytes 00000803 (IDX of images), found {magic};" in refused(path, idx_files.check_idx, IMAGES)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    "sizes", [(0, 28, 28), (60_001, 28, 28), (2**31, 28, 28), (2**32 - 1, 28, 28), (2, 2**32 - 1, 28), (2, 28, 0)]
)
def test_impossible_sizes_allocate_nothing(tmp_path, suffix, sizes):
    path = store(tmp_path / f"images{suffix}", IMAGES.magic + struct.pack(">3I", *sizes) + bytes(2 * 28 * 28))
    tracemalloc.start()
    refused(path, idx_files.read_idx, IMAGES)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


def test_plain_size_is_checked_before_its_claim_is_allocated(tmp_path):
    path = store(tmp_path / "images", IMAGES.magic + struct.pack(">3I", 60_000, 28, 28) + bytes(28 * 28))
    tracemalloc.start()
    assert "47,040,016 bytes for 60,000 images, found 800;" in refused(path, idx_files.read_idx, IMAGES)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


def test_gzip_bomb_is_not_inflated(tmp_path):
    path = store(tmp_path / "images.gz", idx(images(1)) + bytes(2**26))
    tracemalloc.start()
    assert "784 bytes after the header for 1 images, found more than 784;" in refused(path, idx_files.read_idx, IMAGES)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize("position", [1, 12, -5, -1], ids=["magic", "data", "checksum", "length"])
def test_damaged_gzip(tmp_path, position):
    path = store(tmp_path / "labels.gz", idx(np.arange(10, dtype=np.uint8)))
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)
    refused(path, idx_files.read_idx, LABELS)


def test_folder_in_place_of_a_file(tmp_path):
    refused(tmp_path, idx_files.read_idx, IMAGES)
