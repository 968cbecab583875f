"""Files that were made to do harm: each is one clear error, runs nothing, and costs neither memory nor other files."""

import gzip
import io
import os
import struct
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from data_files import idx, images, store, write_mnist
from preparing import contents, remotes

from raytorch.config import Cifar10Data
from raytorch.datasets import preparation, prepare
from raytorch.datasets.archives import inflate
from raytorch.errors import DataError

FOLDER = "cifar-10-batches-py"
SIZE = 31_000_000

CHECK = """
import re, sys
from raytorch.cli.main import main
sys.argv[0] = "raytorch"
try:
    main()
finally:
    print("peak", re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
    assert not {"torch", "ray"} & set(sys.modules)
"""


def checked(name: str, root: Path) -> tuple[str, int]:
    """What ``raytorch data check``, which has to fail, answers, and the MiB of memory that it took at its peak."""
    command = [sys.executable, "-c", CHECK, "data", "check", name, "--root", str(root)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 2, result
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr, int(result.stdout.split()[-1]) // 1024


def store_batches(root: Path, content: bytes) -> None:
    first = store(root / FOLDER / "data_batch_1", content)
    for name in ("data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        os.link(first, root / FOLDER / name)


# -- pickles -----------------------------------------------------------------------------------------------------------

# Of the size of a batch, as another size is refused unread.
PICKLES = {
    "many sets": b"(" + b"\x8f" * SIZE + b"1.",
    "many dictionaries within each other": b"}" + b"K\x01}" * (SIZE // 3) + b"s" * 100 + b".",
    "tuples within each other, as a key": b"})" + b"\x85" * SIZE + b"Ns.",
    "many numbers": b"(" + b"M\xff\xff" * (SIZE // 3) + b"l.",
    "many names of an array's parts": b"cnumpy\ndtype\n0" * (SIZE // 14) + b"N.",
    "text that never ends": b"V" + b"\xf0\x9f\x98\x80" * (SIZE // 4) + b"\n.",
    "one byte string": b"B" + struct.pack("<I", SIZE) + bytes(SIZE) + b".",
}


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_that_grows(tmp_path, name):
    store_batches(tmp_path, PICKLES[name])
    message, peak = checked("cifar10", tmp_path)
    assert f"{FOLDER}/data_batch_1: expected a pickled dictionary" in message
    assert peak < 400


def test_a_pickle_that_would_run_a_command(tmp_path):
    marker = tmp_path / "ran"
    call = f"cos\nsystem\n(V: > {marker}\ntR0".encode()
    store_batches(tmp_path, call + b"B" + struct.pack("<I", SIZE) + bytes(SIZE) + b".")
    message, _ = checked("cifar10", tmp_path)
    assert "the name os.system, which no array needs" in message
    assert not marker.exists()


# -- gzip and IDX ------------------------------------------------------------------------------------------------------


def bomb(start: bytes, gibibytes: int) -> bytes:
    """A gzip file of ``start`` and then zeros."""
    zeros = gzip.compress(bytes(2**26), mtime=0)
    return gzip.compress(start, mtime=0) + zeros * (16 * gibibytes)


def test_a_gzip_bomb_as_idx(tmp_path):
    path = write_mnist(tmp_path, ".gz") / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    path.write_bytes(bomb(idx(images(7)), 64))
    message, peak = checked("mnist", tmp_path)
    assert "5,488 bytes after the header for 7 images, found more than 5,488;" in message
    assert peak < 200


def test_a_gzip_bomb_as_an_archive(tmp_path):
    archive = tmp_path / "bomb.tar.gz"
    archive.write_bytes(bomb(b"", 1))
    with pytest.raises(DataError, match=r"bomb\.tar\.gz: expected at most 1,000,000 bytes when it is inflated"):
        inflate(archive, tmp_path / "plain", 1_000_000)
    assert (tmp_path / "plain").stat().st_size < 2**21


# -- archives ----------------------------------------------------------------------------------------------------------


def member(name: str, kind: bytes = tarfile.REGTYPE, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in fields.items():
        setattr(info, key, value)
    return info


MEMBERS = {
    "a name above": member("../ran"),
    "a name above the folder": member(f"{FOLDER}/../ran"),
    "the folder above": member(f"{FOLDER}/.."),
    "no name": member(f"{FOLDER}/"),
    "another folder": member("other/ran"),
    "a folder within": member(f"{FOLDER}/within/ran"),
    "a folder above": member("..", tarfile.DIRTYPE),
    "an absolute name": member("/tmp/ran"),
    "a name of two slashes": member(f"{FOLDER}//ran"),
    "a link to a file above": member(f"{FOLDER}/data_batch_2", tarfile.SYMTYPE, linkname="../../ran"),
    "an absolute link": member(f"{FOLDER}/data_batch_2", tarfile.SYMTYPE, linkname="/etc/passwd"),
    "a hard link": member(f"{FOLDER}/data_batch_2", tarfile.LNKTYPE, linkname="../../ran"),
    "the folder as a link": member(FOLDER, tarfile.SYMTYPE, linkname=".."),
    "a pipe": member(f"{FOLDER}/data_batch_2", tarfile.FIFOTYPE),
    "a device": member(f"{FOLDER}/data_batch_2", tarfile.CHRTYPE, devmajor=1, devminor=3),
    "a sparse file": member(f"{FOLDER}/data_batch_2", pax_headers={"GNU.sparse.size": str(2**40)}),
    "a name that is not text": member(f"{FOLDER}/\x1b[2J/\n"),
}


@pytest.fixture
def root(tmp_path) -> Iterator[Path]:
    """A folder deep enough that nothing above it is hit; fails if anything beside it was written."""
    folder = tmp_path / "above" / "data"
    folder.mkdir(parents=True)
    yield folder
    assert [path.name for path in (tmp_path / "above").iterdir()] == ["data"]
    assert [path.name for path in tmp_path.iterdir()] == ["above"]
    assert not Path("/tmp/ran").exists()


def prepared_from(root: Path, monkeypatch: pytest.MonkeyPatch, plain: bytes) -> str:
    """The error of preparing CIFAR-10 from an archive of which only the checksum is right."""
    name = "cifar-10-python.tar.gz"
    packed = gzip.compress(plain, mtime=0)
    monkeypatch.setattr(preparation, "CIFAR10", remotes({name: packed})[0])
    (root / name).write_bytes(packed)
    with pytest.raises(DataError) as caught:
        prepare(Cifar10Data(root=str(root)))
    assert not (root / FOLDER).exists()
    assert not any(path.endswith("data_batch_1") for path in contents(root))
    message = str(caught.value)
    assert message.isprintable()
    return message


@pytest.mark.parametrize("name", MEMBERS)
def test_an_archive_with_a_member_that_leads_elsewhere(root, monkeypatch, name):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(member(f"{FOLDER}/data_batch_1", size=3), io.BytesIO(b"one"))
        tar.addfile(MEMBERS[name])
    message = prepared_from(root, monkeypatch, stream.getvalue())
    assert "cifar-10-python.tar: expected " in message
    assert "plain files only" in message or f"files in {FOLDER}/ only" in message


@pytest.mark.parametrize("plain", [b"", b"x" * 511, b"x" * 10_240], ids=["nothing", "less than a header", "no header"])
def test_an_archive_that_is_none(root, monkeypatch, plain):
    assert "expected a tar archive, found one that cannot be read" in prepared_from(root, monkeypatch, plain)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("size", [2**40, 2**80])
def test_an_archive_that_claims_more_than_it_holds(root, monkeypatch, kind, size):
    header = member(f"{FOLDER}/data_batch_1", kind, size=size).tobuf(tarfile.GNU_FORMAT)
    prepared_from(root, monkeypatch, header + b"x" * 10_240)
