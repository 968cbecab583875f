"""Preparing data sets: what is missing is downloaded once, whoever asks, and gets its name when it is whole."""

import io
import os
import tarfile
import threading
from pathlib import Path

import pytest
from data_files import write_mnist
from file_server import FileServer
from preparing import contents, preparing, remotes, small_mnist

from raytorch.cli.main import app
from raytorch.config import Cifar10Data, MnistData, MnistStripsData, MovingMnistData
from raytorch.datasets import download, load_dataset, preparation, prepare
from raytorch.errors import DataError

BATCHES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(download, "_PAUSES_S", (0, 0, 0))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves a small MNIST, which is the published one for as long."""
    with FileServer(small_mnist(tmp_path / "original")) as server:
        monkeypatch.setattr(preparation, "MNIST", remotes(server.files, server.url))
        yield server


def archive_of(names: list[str]) -> bytes:
    """A .tar.gz of files in CIFAR-10's folder, each of which holds its own name."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        folder = tarfile.TarInfo("cifar-10-batches-py")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in names:
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(name)
            tar.addfile(member, io.BytesIO(name.encode()))
    return stream.getvalue()


def publish_cifar10(monkeypatch, content: bytes, *mirrors: str) -> None:
    (remote,) = remotes({"cifar-10-python.tar.gz": content}, *mirrors)
    monkeypatch.setattr(preparation, "CIFAR10", remote)


@pytest.mark.parametrize("config", [MnistData, MovingMnistData, MnistStripsData])
def test_mnist_is_downloaded_and_unpacked(tmp_path, server, config):
    root = tmp_path / "new" / "data"
    prepare(config(root=str(root)))
    assert contents(root) == contents(tmp_path / "original")
    assert len(server.requests) == 4


def test_a_run_downloads_if_it_is_told_to(tmp_path, server):
    with pytest.raises(DataError, match="no folder"):
        load_dataset(MnistData(root=str(tmp_path / "data")), "train")
    assert len(load_dataset(MnistData(root=str(tmp_path / "data"), download=True), "train")) == 7


def test_only_what_is_missing_is_downloaded(tmp_path, server):
    raw = write_mnist(tmp_path / "data", ".gz") / "MNIST" / "raw"
    prepare(MnistData(root=str(tmp_path / "data")))
    assert server.requests == []
    (raw / "t10k-labels-idx1-ubyte.gz").unlink()
    prepare(MnistData(root=str(tmp_path / "data")))
    assert server.requests == [("t10k-labels-idx1-ubyte.gz", None)]
    assert not (tmp_path / "data" / ".download").exists()


def test_cifar10_is_downloaded_and_unpacked(tmp_path, monkeypatch):
    content = archive_of(BATCHES)
    with FileServer({"cifar-10-python.tar.gz": content}, cut=len(content) // 2 + 1) as server:
        publish_cifar10(monkeypatch, content, server.url)
        prepare(Cifar10Data(root=str(tmp_path)))
    assert contents(tmp_path) == {f"cifar-10-batches-py/{name}": name.encode() for name in BATCHES}
    assert len(server.requests) == 2


def test_what_was_downloaded_before_a_kill_is_not_asked_for_again(tmp_path, monkeypatch):
    content = archive_of(BATCHES)
    publish_cifar10(monkeypatch, content, "http://127.0.0.1:9/")
    for folder, names in ((".download", BATCHES[2:]), ("cifar-10-batches-py", BATCHES[:2])):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_text(name, encoding="utf-8")
    (tmp_path / ".download" / "cifar-10-python.tar.gz").write_bytes(content)
    prepare(Cifar10Data(root=str(tmp_path)))
    assert contents(tmp_path) == {f"cifar-10-batches-py/{name}": name.encode() for name in BATCHES}


def test_an_archive_put_there_by_hand_is_unpacked(tmp_path, monkeypatch):
    content = archive_of(BATCHES)
    publish_cifar10(monkeypatch, content)
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(content)
    prepare(Cifar10Data(root=str(tmp_path)))
    assert (tmp_path / "cifar-10-batches-py" / "test_batch").read_bytes() == b"test_batch"
    assert (tmp_path / "cifar-10-python.tar.gz").read_bytes() == content


def test_another_archive_put_there_is_not_opened(tmp_path):
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(archive_of(["../../ran"]))
    with pytest.raises(DataError, match=r"expected the published file, 170,498,071 bytes of SHA-256 6d958be"):
        prepare(Cifar10Data(root=str(tmp_path)))
    assert contents(tmp_path) == {path.name: path.read_bytes()}


def test_without_network_the_files_to_put_there_are_named(tmp_path, server):
    write_mnist(tmp_path / "data")
    (tmp_path / "data" / "MNIST" / "raw" / "train-images-idx3-ubyte").unlink()
    before = contents(tmp_path / "data")
    server.files.clear()
    with pytest.raises(DataError) as caught:
        prepare(MnistData(root=str(tmp_path / "data")))
    message = str(caught.value)
    assert f"{server.url}train-images-idx3-ubyte.gz: HTTP Error 404" in message
    assert message.endswith(f"put train-images-idx3-ubyte.gz into {tmp_path / 'data'} and prepare it again")
    assert contents(tmp_path / "data") == before


def test_the_command_prepares_and_checks(tmp_path, server, capsys):
    root = str(tmp_path / "data")
    for _ in range(2):  # the second time there is nothing to do
        app(["data", "prepare", "mnist", "--root", root], standalone_mode=False)
        assert capsys.readouterr() == (f"mnist in {root}: 7 + 3 images\n", "")
    assert len(server.requests) == 4


@pytest.mark.parametrize("place", ["data", "data/MNIST"])
def test_a_file_in_the_way_of_a_folder(tmp_path, server, place):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="could not download the data set"):
        prepare(MnistData(root=str(tmp_path / "data")))


@pytest.mark.parametrize("place", [".download.lock", ".download/train-images-idx3-ubyte.gz"])
def test_a_pipe_in_the_way_of_a_file_is_not_waited_for(tmp_path, server, place):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / place)
    with pytest.raises(DataError, match=r"could not download the data set .*(No such device|not a file)"):
        prepare(MnistData(root=str(tmp_path)))


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path, server):
    (tmp_path / "precious").write_text("kept", encoding="utf-8")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / ".download.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(DataError, match="could not download the data set"):
        prepare(MnistData(root=str(tmp_path / "data")))
    assert (tmp_path / "precious").read_text(encoding="utf-8") == "kept"


def test_ranks_of_one_process_download_once(tmp_path, server):
    server.pace_s = 0.01
    config = MnistData(root=str(tmp_path / "data"), download=True)
    sizes: list[int] = []
    ranks = [threading.Thread(target=lambda: sizes.append(len(load_dataset(config, "train")))) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert sizes == [7] * 4
    assert len(server.requests) == 4


def test_processes_that_prepare_one_folder_at_once_download_once(tmp_path, server):
    server.pace_s = 0.05
    processes = [preparing(tmp_path / "data", preparation.MNIST) for _ in range(2)]
    errors = [process.communicate(timeout=30)[1] for process in processes]
    assert errors == ["", ""]
    assert [process.returncode for process in processes] == [0, 0]
    assert contents(tmp_path / "data") == contents(tmp_path / "original")
    assert len(server.requests) == 4


def test_a_corrupt_file_that_is_there_is_neither_replaced_nor_accepted(tmp_path, server):
    path: Path = write_mnist(tmp_path / "data") / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    path.write_bytes(b"")
    config = MnistData(root=str(tmp_path / "data"), download=True)
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte: expected a header of 8 bytes, found 0; .* delete it"):
        load_dataset(config, "test")
    assert path.read_bytes() == b""
