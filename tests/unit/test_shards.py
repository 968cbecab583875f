"""Tar shards: their index, what is read by it, and archives that are not in order or mean harm."""

import io
import itertools
import os
import pickle
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from shard_files import CONTENT, END, files_of, header, npy, pax, sample_files, write_shard
from typer.testing import CliRunner

from raytorch.cli.main import app
from raytorch.config import ImagesData, ShardsData
from raytorch.config.file import from_data
from raytorch.datasets import TrainLoader, load_splits
from raytorch.datasets.splits import Splits
from raytorch.errors import ConfigError, DataError
from raytorch.sources import open_source
from raytorch.sources.shard_index import read_index, write_index

CPU = torch.device("cpu")
FIELDS = ["png", "cls", "left.npy", "json", "txt"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split, ends in {"train": [0, 5, 9, 12], "test": [12, 15]}.items():
        for start, end in itertools.pairwise(ends):
            write_index(write_shard(tmp_path / split / f"{start:03}.tar", sample_files(range(start, end))))
    return tmp_path


def splits(root: Path, run: dict[str, Any] | None = None, **data: Any) -> Splits:
    section = {"name": "shards", "root": str(root), "fields": FIELDS, "size": 16, **data}
    return load_splits(from_data({"epochs": 1, "data": section, **(run or {})}), CPU)


def opened(root: Path, split: str = "train", **data: Any) -> Any:
    return open_source(ShardsData(root=str(root), size=16, **data), split, training=False)


def test_every_field_is_read_as_its_extension_says(root: Path) -> None:
    data = opened(root, fields=FIELDS)
    images, classes, left, told, texts = data.collate([data[index] for index in (11, 0, 7)])
    assert images.shape == (3, 3, 16, 16)
    assert classes.tolist() == [2, 0, 1]
    assert left.tolist() == [[11, 12, 13], [0, 1, 2], [7, 8, 9]]
    assert (told, texts[1]) == ([{"number": number} for number in (11, 0, 7)], "Nr. 0, größer")
    assert data.facts == {"num_classes": 3}
    assert (len(data), data.labels.tolist(), data.blocks) == (12, [0, 1, 2] * 4, [5, 4, 3])


def test_a_sample_without_a_class_is_not_drawn(root: Path) -> None:
    without = [(name, content) for name, content in sample_files(range(5)) if name != "00003.cls"]
    write_index(write_shard(root / "train/000.tar", without))
    run = {"sampling": "balanced"}
    with pytest.raises(ConfigError, match="sampling: balanced draws by labels"):
        splits(root, run)
    weights = splits(root, run, on_error="skip").weights
    assert weights is not None
    assert weights.tolist() == [0 if number == 3 else [1 / 3, 1 / 4, 1 / 4][number % 3] for number in range(12)]


def test_images_are_those_of_the_same_files_in_folders(root: Path) -> None:
    for number in range(12):
        folder = root / "folders" / str(number % 3)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:03}.png").write_bytes(files_of(number)["png"])
    in_folders = open_source(ImagesData(root=str(root), train="folders", size=16), "train", training=False)
    in_shards = opened(root, fields=["png", "cls"])
    assert in_shards.facts == {"input_shape": [3, 16, 16], "num_classes": 3}
    batches = [
        data.on_device(data.collate([data[index] for index in indices]))
        for data, indices in ((in_folders, range(12)), (in_shards, sorted(range(12), key=lambda number: number % 3)))
    ]
    assert all(torch.equal(one, other) for one, other in zip(*batches, strict=True))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("key", ["{}", "some/folder/{}", f"{'long' * 20}/{'name' * 20}/{{}}", "größer/{}"])
def test_archives_of_all_forms_and_names_are_indexed_as_tarfile_reads_them(tmp_path: Path, form: int, key: str) -> None:
    shard = write_shard(tmp_path / "train/a.tar", sample_files(range(3), key), form)
    assert write_index(shard) == 3
    placed = read_index(Path(f"{shard}.index").read_bytes(), shard.stat().st_size, ["txt"], str(shard))
    assert placed.keys == [key.format(number) for number in range(3)]
    with tarfile.open(shard) as archive:
        expected = [[archive.getmember(f"{key.format(number)}.txt").offset_data] for number in range(3)]
    assert placed.offsets.tolist() == expected
    assert opened(tmp_path, test=0.5, fields=["txt"])[2] == ("Nr. 2, größer",)


@pytest.mark.parametrize("shuffle", ["full", "blocks"])
def test_every_sample_is_trained_on_once_whoever_reads_it(root: Path, shuffle: str) -> None:
    def batches(readers: int) -> list[Any]:
        augment = {"crop": True, "flip": True}
        found = splits(root, readers=readers, augment=augment, cache="memory" if readers else "none")
        blocks = torch.tensor(found.train.blocks) if shuffle == "blocks" else None  # type: ignore[attr-defined]
        loader = TrainLoader(found.train, batch_size=5, blocks=blocks)
        contents = [batch.content for [batch] in loader.remaining()]
        loader.next_epoch()
        return contents + [batch.content for [batch] in loader.remaining()]

    alone, read = batches(0), batches(2)
    numbers = [told["number"] for batch in alone for told in batch[3]]
    assert sorted(numbers) == sorted([*range(12)] * 2)
    for one, other in zip(alone, read, strict=True):
        assert torch.equal(one[0], other[0])
        assert one[3:] == other[3:]


def test_classes_are_counted_in_the_training_shards(root: Path) -> None:
    write_index(write_shard(root / "test/012.tar", sample_files([12, 13])))  # of the classes 0 and 1
    assert opened(root, "test", fields=["cls"]).facts == {"num_classes": 3}
    assert opened(root, "test", fields=["cls"], num_classes=7).facts == {"num_classes": 7}
    write_index(write_shard(root / "test/012.tar", [("a.cls", b"5")]))
    with pytest.raises(DataError, match=r"/test/012.tar: a.cls: expected a class below 3, for data.num_classes or tho"):
        opened(root, "test", fields=["cls"])


def test_the_command_indexes_files_and_folders(root: Path) -> None:
    for path in root.rglob("*.index"):
        path.unlink()
    result = CliRunner().invoke(app, ["data", "index", str(root / "train"), str(root / "test/012.tar")])
    assert result.exit_code == 0, result.output
    assert f"{root}/train/005.tar: 4 samples" in result.output.replace("\n", "")
    assert sorted(path.name for path in root.rglob("*")) == sorted(
        ["train", "test", *(f"{start:03}.tar{end}" for start in (0, 5, 9, 12) for end in ("", ".index"))]
    )
    assert len(opened(root)) == 12


def test_it_is_sent_to_readers_without_its_shards(root: Path) -> None:
    data = opened(root, fields=FIELDS)
    assert len(sent := pickle.dumps(data)) < 8_000
    assert str(pickle.loads(sent)[3][1:]) == str(data[3][1:])


def changed(path: Path, change: Callable[[bytearray], Any]) -> None:
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda shard: shard.unlink(),
            "/train: expected .tar files of the data set, found none among the 1 files there",
        ),
        (
            lambda shard: Path(f"{shard}.index").unlink(),
            "{shard}.index: cannot be read: there is no such file; wri",
        ),
        (
            lambda shard: Path(f"{shard}.index").write_bytes(b"PAR1"),
            "{shard}.index: expected an index of a shard, found an",
        ),
        (
            lambda shard: changed(shard, lambda content: content.extend(bytes(512))),
            "{shard}: its index is of another: ",
        ),
        (
            lambda shard: changed(shard, lambda content: content.__delitem__(slice(-512, None))),
            "{shard}: its index is ",
        ),
    ],
)
def test_an_index_that_is_missing_or_stale_is_refused(tmp_path: Path, change: Any, told: str) -> None:
    shard = write_shard(tmp_path / "train/a.tar", sample_files(range(2)))
    write_index(shard)
    change(shard)
    with pytest.raises(DataError) as caught:
        opened(tmp_path)
    assert str(caught.value).startswith(told.format(shard=shard) if "{" in told else f"{tmp_path}{told}")
    if "{" in told:
        assert f"raytorch data index {shard}" in str(caught.value)


def test_an_index_that_points_elsewhere_is_refused(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "train/a.tar", sample_files(range(2)))
    write_index(shard)
    index = Path(f"{shard}.index")
    table = parquet.read_table(io.BytesIO(index.read_bytes().partition(b"\n")[2]))
    for name, values in (("offsets", [[-5] * 5] * 2), ("sizes", [[1 << 62] * 5] * 2), ("sizes", [[3], []])):
        place = table.schema.get_field_index(name)
        wrong = table.set_column(place, table.field(place), pa.array(values, pa.list_(pa.int64())))
        parquet.write_table(wrong, written := io.BytesIO())
        content = written.getvalue()
        index.write_bytes(b"raytorch shard index 2 %08x\n" % zlib.crc32(content) + content)
        with pytest.raises(DataError, match=r"a.tar.index: its places are not in the shard; write it anew: raytorch "):
            opened(tmp_path)


def test_a_shard_that_has_changed_is_told_when_it_is_read(root: Path) -> None:
    data = opened(root, fields=["txt", "cls"])
    shard = root / "train/005.tar"
    write_shard(shard, [(f"{name[:4]}x{name[5:]}", content) for name, content in sample_files(range(5, 9))])
    with pytest.raises(DataError) as caught:
        data[6]
    assert str(caught.value).startswith(f"{shard}: 00006.txt: expected it from byte ")
    assert str(caught.value).endswith(
        f"found another: the shard has changed; write its index anew: raytorch data index {shard}"
    )
    changed(shard, lambda content: content.__delitem__(slice(6000, None)))
    with pytest.raises(DataError, match=rf"^{shard}: 00006.txt: {shard}: cut short: expected 3,599 "):
        data[6]
    assert data[4] == ("Nr. 4, größer", 1)


@pytest.mark.parametrize(
    ("field", "content", "told"),
    [
        ("txt", None, "expected the field txt, for data.fields, found png, cls, left.npy, json"),
        ("txt", b"\xff", "expected a file txt: 'utf-8' codec can't decode"),
        ("cls", b"cat", "expected a file cls: invalid literal for int() with base 10: 'cat'"),
        ("cls", b"-1", "expected a file cls: a class is at least 0, not -1"),
        ("json", b"{", "expected a file json: Expecting property name"),
        ("json", b"[" * 100_000, "expected a file json: maximum recursion depth"),
        (
            "left.npy",
            npy(np.array([print])),
            "expected a file npy: an array of numbers, not of objects, which would be",
        ),
        ("left.npy", npy(np.ones(3))[:-4], "expected a file npy: "),
        ("png", b"GIF89a", "expected a JPEG, PNG or WebP image, found bytes that begin with b'GIF89a'"),
    ],
)
def test_a_broken_sample_is_told_by_shard_key_and_field(tmp_path: Path, field: str, content: Any, told: str) -> None:
    files = files_of(1) | {field: content}
    shard = write_shard(
        tmp_path / "train/a.tar",
        [*sample_files([0]), *((f"b/1.{name}", content) for name, content in files.items() if content is not None)],
    )
    assert write_index(shard) == 2
    data = opened(tmp_path, fields=FIELDS, num_classes=9)
    with pytest.raises(DataError) as caught:
        data[1]
    assert str(caught.value).startswith(f"{shard}: b/1.{field}: {told}")
    assert data[0][1] == 0


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (
            {"fields": ["jpg", "mp4"]},
            "data.fields: fields may end in jpg, jpeg, png, webp, cls, json, txt, npy, not mp4",
        ),
        (
            {"fields": ["jpg", "png"]},
            "data.fields: fields has more than one image, each of which would be changed at ra",
        ),
        ({"fields": ["cls", "cls"]}, "data.fields: fields has one twice; leave it out"),
        ({"fields": []}, "data.fields: "),
    ],
)
def test_fields_that_cannot_be_are_told_before_anything_is_read(data: Any, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        splits(Path("nowhere"), **data)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("archive", "told"),
    [
        (b"", "cut short: expected 512 bytes from byte 0 on, and it ends at 0"),
        (header() + CONTENT + b"x", "cut short: expected 512 bytes from byte 1,024 on, and it ends at 1,025"),
        (header() + CONTENT + END + b"x" * 512, "byte 2,048: expected a header of a tar archive, found none"),
        (header() + b"hel", "cut short: expected 5 bytes from byte 512 on, and it ends at 515"),
        (header(size=b"77777777777\0") + CONTENT + END, "cut short: expected 8,589,934,591 bytes from byte 512 on, an"),
        (header(size=b"\x80" + b"\x7f" * 11) + CONTENT + END, "cut short: expected 154,"),
        (header(size=b"\xff" * 12) + CONTENT + END, "byte 0: expected the size of a file, found b'\\xff"),
        (header(size=b"-0000000005\0") + CONTENT + END, "byte 0: expected the size of a file, found b'-0000000005"),
        (header(size=b"five\0".ljust(12)) + CONTENT + END, "byte 0: expected the size of a file, found b'five"),
        (b"x" * 2048, "byte 0: expected a header of a tar archive, found none"),
        (b"\x1f\x8b" + bytes(2048), "byte 0: expected a header of a tar archive, found none; unpack it, as shards are"),
        (
            pax(b"20 size=99999999999\n") + header() + CONTENT + END,
            "cut short: expected 99,999,999,999 bytes from byte ",
        ),
        (pax(b"11 size=-5\n") + header() + CONTENT + END, "byte 1,024: expected the size of a file, found '-5'"),
        (
            header("x", b"00077777777\0", b"L") + CONTENT + END,
            "byte 0: expected at most 65,536 bytes of a name, found 16",
        ),
        (header(kind=b"S") + CONTENT + END, "byte 0: expected whole files, found a sparse one; make it without them"),
        (
            header("a.txt") + CONTENT + header("b.txt") + CONTENT + header("a.cls") + CONTENT + END,
            "expected the files of",
        ),
        (header("a.txt") + CONTENT + header("a.TXT") + CONTENT + END, "expected one file a.TXT, found another"),
    ],
)
def test_an_archive_that_is_not_in_order_is_refused(tmp_path: Path, archive: bytes, told: str) -> None:
    shard = tmp_path / "a.tar"
    shard.write_bytes(archive)
    with pytest.raises(DataError) as caught:
        write_index(shard)
    assert str(caught.value).startswith(f"{shard}: {told}")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_links_devices_and_names_from_the_root_do_no_harm(tmp_path: Path) -> None:
    shard = tmp_path / "train/a.tar"
    shard.parent.mkdir()
    nothing = b"00000000000\0"
    others = [
        header(f"link{number}.txt", nothing, kind) for number, kind in enumerate((b"1", b"2", b"3", b"4", b"5", b"6"))
    ]
    named = [header("/etc/passwd.txt"), header("../../up.txt"), header("no-extension"), header(".hidden")]
    bad_records = pax(b"9999999 path=x\n") + header("c.txt") + CONTENT + pax(b"0 a=b\n") + header("d.txt") + CONTENT
    shard.write_bytes(b"".join(others) + b"".join(each + CONTENT for each in named) + bad_records + END)
    assert write_index(shard) == 4
    data = opened(tmp_path, fields=["txt"])
    assert [data[index] for index in range(4)] == [("hello",)] * 4
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tar", "a.tar.index", "train"]


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(
        DataError, match=r"a.tar: cannot be indexed: it is not a file, but a folder, a pipe or a device"
    ):
        write_index(tmp_path / "a.tar")
