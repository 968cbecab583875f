"""Shards that are not what their index says, indexes that are damaged, and archives of the odder kinds."""

import fcntl
import io
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from shard_files import CONTENT, END, header, npy, sample_files, write_shard

from raytorch.config import ShardsData
from raytorch.errors import DataError
from raytorch.sources import open_source
from raytorch.sources.files import Root
from raytorch.sources.shard_index import write_index


def opened(root: Path, *fields: str, **data: Any) -> Any:
    section = ShardsData(root=str(root), fields=list(fields), size=16, **data)
    return open_source(section, "train", training=False)


def labelled(path: Path, classes: list[int], between: int = 0) -> Path:
    """Samples whose headers do not tell of their classes."""
    files = [
        (f"{number}.{name}", content)
        for number, label in enumerate(classes)
        for name, content in {
            "png": dict(sample_files([number]))[f"{number:05}.png"],
            **({"zip": bytes(between)} if between else {}),
            "cls": str(label).encode(),
            "txt": b"some text",
        }.items()
    ]
    return write_shard(path, files)


@pytest.mark.parametrize("fields", [("png", "cls"), ("cls", "png"), ("txt", "cls"), ("cls",)])
@pytest.mark.parametrize("between", [0, 200_000])
def test_a_class_that_has_changed_in_place_is_told(tmp_path: Path, fields: tuple[str, ...], between: int) -> None:
    shard = labelled(tmp_path / "train/a.tar", [0, 1, 2], between)
    write_index(shard)
    data = opened(tmp_path, *fields, cache="memory")
    kept = data[0]  # in the cache, where it is read with its class
    labelled(shard, [2, 1, 0], between)
    assert data[1][fields.index("cls")] == 1
    for index in (0, 2) if "png" not in fields else (2, 2):
        with pytest.raises(DataError) as caught:
            data[index]
        assert str(caught.value) == (
            f"{shard}: {index}.cls: expected the class {index}, found b'{2 - index}': the shard has changed; write its "
            f"index anew: raytorch data index {shard}"
        )
    if "png" in fields:
        assert data[0][fields.index("cls")] == kept[fields.index("cls")] == 0
    write_index(shard)
    anew = opened(tmp_path, *fields)
    assert [anew[index][fields.index("cls")] for index in range(3)] == [2, 1, 0]


def test_the_files_of_a_sample_are_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, between in (("near", 0), ("far", 200_000)):
        write_index(labelled(tmp_path / name / "a.tar", [0, 1, 2], between))
    near = opened(tmp_path, "png", "cls", "txt", train="near", cache="memory")
    far = opened(tmp_path, "png", "cls", "txt", train="far")
    read, ranges = Root.read, []

    def counted(self: Root, name: str, start: int = 0, size: int | None = None, **options: Any) -> bytes:
        ranges.append(size)
        return read(self, name, start, size, **options)

    monkeypatch.setattr(Root, "read", counted)
    first = near[1]
    assert len(ranges) == 1
    assert near[1][1:] == first[1:]
    assert (len(ranges), ranges[1] < 4_000) == (2, True)  # its text, and no longer its image
    assert far[1][1:] == first[1:]
    assert len(ranges) == 2 + 3
    assert sum(ranges[2:]) < 20_000


def parquet_of(**columns: list[int]) -> bytes:
    parquet.write_table(pa.table(columns), file := io.BytesIO())
    return file.getvalue()


def test_a_damaged_index_is_never_followed(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "train/a.tar", sample_files(range(20)))
    write_index(shard)
    index = Path(f"{shard}.index")
    content, rng = index.read_bytes(), np.random.default_rng(0)
    for number in range(300):
        damaged = bytearray(content)
        damaged[rng.integers(len(content))] ^= 1 << rng.integers(8)
        start, stop = np.sort(rng.integers(0, len(content), 2))
        index.write_bytes(damaged if number % 3 else damaged[:start] + damaged[stop:])
        with pytest.raises(DataError, match=r"a.tar.index: expected an index of a shard, found .*; write it anew: ray"):
            opened(tmp_path, "txt", "cls")
    for table in (b"PAR1", parquet_of(numbers=[1, 2])):  # as nothing but intent makes it
        index.write_bytes(b"raytorch shard index 2 %08x\n" % zlib.crc32(table) + table)
        with pytest.raises(
            DataError, match=r"a.tar.index: expected an index of a shard.*; write it anew: raytorch data"
        ):
            opened(tmp_path, "txt", "cls")
    index.write_bytes(content)
    assert opened(tmp_path, "txt", "cls")[3] == ("Nr. 3, größer", 0)


def with_header(text: bytes) -> bytes:
    return b"\x93NUMPY\1\0" + (119).to_bytes(2, "little") + text.ljust(118) + b"\n" + bytes(96)


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.zeros(3))
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (with_header(b"{'descr': '<f8', 'fortran_order': False, 'shape': (4,3), "), "its header is damaged: "),
        (
            with_header(b"{'descr': '<f8', 'fortran_order': False, 'shape': (274877906944,), }"),
            "cut short: 2,199,023,2",
        ),
        (
            with_header(b"{'descr': '<f8', 'fortran_order': False, 'shape': (-1, -1), }"),
            "cut short: 8 bytes of float64 [-",
        ),
        (npz(), "the magic string is not correct"),
        (b"", "EOF: reading magic string"),
        (npy(np.zeros(2, [("a", "f4")])), "an array of numbers, not of [('a', '<f4')]"),
        (npy(np.array(["a"])), "an array of numbers, not of <U1"),
        (npy(np.array(["2026-01-01"], "M8[D]")), "an array of numbers, not of datetime64[D]"),
        (npy(np.zeros(2, np.longdouble)), "PyTorch has no numbers of float128"),
    ],
)
def test_an_array_that_cannot_be_read_is_told_with_its_shard(tmp_path: Path, content: bytes, told: str) -> None:
    shard = write_shard(tmp_path / "train/a.tar", [("0.npy", content), ("1.npy", npy(np.ones(2)))])
    write_index(shard)
    data = opened(tmp_path, "npy")
    with pytest.raises(DataError) as caught:
        data[0]
    assert str(caught.value).startswith(f"{shard}: 0.npy: expected a file npy: {told}")
    assert data[1][0].tolist() == [1, 1]


@pytest.mark.parametrize("form", [">f4", "<i2", ">c8", "?", "<f2"])
def test_arrays_of_any_order_of_bytes_are_read(tmp_path: Path, form: str) -> None:
    arrays = [np.arange(6).reshape(2, 3).astype(form), np.asfortranarray(np.arange(6).reshape(2, 3).astype(form))]
    single = np.array(7).astype(form)
    files = [(f"{number}.npy", npy(array)) for number, array in enumerate([*arrays, single, np.zeros((0, 2), form)])]
    write_index(write_shard(tmp_path / "train/a.tar", files))
    data = opened(tmp_path, "npy")
    for number, array in enumerate([*arrays, single, np.zeros((0, 2), form)]):
        assert torch.equal(data[number][0], torch.from_numpy(array.astype(array.dtype.newbyteorder("="))))


def test_a_link_whose_header_names_a_size_has_no_content(tmp_path: Path) -> None:
    shard = tmp_path / "train/a.tar"
    shard.parent.mkdir()
    shard.write_bytes(header("b.txt", kind=b"1") + header("a.txt") + CONTENT + END)
    with tarfile.open(shard) as archive:
        assert archive.getnames() == ["b.txt", "a.txt"]
    assert write_index(shard) == 1
    assert opened(tmp_path, "txt")[0] == ("hello",)


@pytest.mark.parametrize("between", [b"", bytes(512), END, bytes(3 << 20)])
@pytest.mark.parametrize("end", [b"", bytes(512), END])
def test_archives_that_follow_each_other_are_read_to_their_end(tmp_path: Path, between: bytes, end: bytes) -> None:
    shard = tmp_path / "train/a.tar"
    shard.parent.mkdir()
    shard.write_bytes(header("a.txt") + CONTENT + between + header("b.txt") + CONTENT + end)
    with tarfile.open(shard, ignore_zeros=True) as archive:
        assert archive.getnames() == ["a.txt", "b.txt"]
    assert write_index(shard) == 2
    assert opened(tmp_path, "txt")[1] == ("hello",)


def test_what_an_indexing_that_was_killed_has_left_goes_with_the_next(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", sample_files(range(2)))
    left, under_way, others = (
        tmp_path / f".{name}-{digit * 16}" for name, digit in (("a.tar", "0"), ("a.tar", "1"), ("b.tar", "2"))
    )
    for path in (left, under_way, others):
        path.write_bytes(b"half of an index")
    with under_way.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as another process does that indexes the same shard
        write_index(shard)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [others.name, under_way.name, "a.tar", "a.tar.index"]
    )
