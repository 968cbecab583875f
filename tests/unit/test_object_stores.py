"""Data sets in a store: what is listed and read there, through a cache, from a server that fails and comes back."""

import logging
import os
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pytest
from lone_runs import final, train, without_ray
from pyarrow import fs
from s3_server import Behaviour, S3Process, serving, uri
from whole_runs import assert_bitwise_equal

from raytorch.config.file import from_data
from raytorch.errors import ConfigError, DataError, StorageError, UserError
from raytorch.sources import retries, stores
from raytorch.sources.files import Root

FILES = {
    "train/x.npy": np.random.default_rng(0).bytes(300_000),
    "train/b/deep/part-2.bin": b"deep",
    "train/b/part-1.bin": b"one",
    "train/b-part.bin": b"between",
    "train/b/.hidden.bin": b"hidden",
    "train/ä ö+%25.bin": b"named",
    "test/y.npy": b"y",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of what the server has; ``bucket/data`` in it is a data set."""
    for name, content in FILES.items():
        file = tmp_path / "served/bucket/data" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return tmp_path / "served"


@pytest.fixture
def served(folder: Path) -> Iterator[tuple[int, Behaviour]]:
    with serving(folder) as server:
        yield server


@pytest.fixture
def behaviour(served: tuple[int, Behaviour]) -> Behaviour:
    return served[1]


@pytest.fixture
def root(served: tuple[int, Behaviour], tmp_path: Path) -> Root:
    return Root(uri(served[0], "bucket/data"), str(tmp_path / "cache"), 1_000_000)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the store's client leave trying to us, and us try at once, for a moment."""

    def connect(address: str) -> tuple[fs.FileSystem, str]:
        endpoint = address.partition("endpoint_override=")[2].partition("&")[0]
        once = fs.AwsStandardS3RetryStrategy(max_attempts=1)
        keys = {"access_key": "key", "secret_key": "secret", "region": "us-east-1"}
        store = fs.S3FileSystem(endpoint_override=endpoint, scheme="http", retry_strategy=once, **keys)
        return store, address.partition("@")[2].partition("?")[0]

    monkeypatch.setattr(stores, "connect", connect)
    monkeypatch.setattr(retries, "pause", lambda tries: None)


def held(root: Path) -> list[str]:
    return sorted(path.name for path in root.parent.joinpath("cache").iterdir() if path.name != "lock")


@pytest.mark.parametrize("names", [["train"], ["."], ["train/*.bin", "test/y.npy"], ["*part*"], ["train/b/", "train"]])
def test_files_are_found_as_in_a_folder_and_in_its_order(folder: Path, root: Root, names: list[str]) -> None:
    found = root.find(names)
    assert found == Root(str(folder / "bucket/data")).find(names)
    assert found == Root((folder / "bucket/data").as_uri()).find(names)
    assert len(found) > 2


def test_a_pattern_is_one_listing_of_what_stands_before_it(root: Root, behaviour: Behaviour) -> None:
    assert [file.name for file in root.find(["train/b/*.bin"])] == ["train/b/part-1.bin", "train/b/deep/part-2.bin"]
    assert behaviour.asked == {"GET /bucket": 1}


def test_listings_of_many_pages_are_whole(folder: Path, root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s3_server.PAGE", 2)
    assert len(root.find(["."])) == len(FILES) - 1


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nix", "s3://***@bucket/data/nix: expected .npy files of the data set, found no such file or folder"),
        ("train/b", "s3://***@bucket/data/train/b: expected .npy files of the data set, found none among the 2 files"),
    ],
)
def test_what_is_not_there_is_told(root: Root, name: str, told: str) -> None:
    with pytest.raises(DataError) as caught:
        root.find([name], [".npy"])
    assert str(caught.value).startswith(told)


def test_a_bucket_that_is_not_there_is_told(served: tuple[int, Behaviour]) -> None:
    with pytest.raises(UserError, match=r"^s3://\*\*\*@bouquet/data.* there is no bucket bouquet; correct the address"):
        Root(uri(served[0], "bouquet/data")).find(["train"])


def test_ranges_are_read_and_no_more(root: Root, behaviour: Behaviour) -> None:
    content = FILES["train/x.npy"]
    assert root.read("train/x.npy", 100_000, 5_000) == content[100_000:105_000]
    assert root.read("train/x.npy", 299_999, 1) == content[-1:]
    assert behaviour.sent == 5_001
    assert behaviour.asked == {"HEAD /bucket/data/train/x.npy": 1, "GET /bucket/data/train/x.npy": 2}
    assert root.read("train/x.npy") == content
    assert root.read("train/x.npy", 250_000) == content[250_000:]
    with pytest.raises(DataError, match=r"x.npy: cut short: expected 2 bytes from byte 299,999 on, found 1$"):
        root.read("train/x.npy", 299_999, 2)
    with pytest.raises(DataError, match=r"^s3://\*\*\*@bucket/data/train/z: cannot be read: there is no such file$"):
        root.read("train/z")


def test_a_whole_file_is_fetched_once_for_all_and_its_name_tells_nothing(
    root: Root, behaviour: Behaviour, tmp_path: Path
) -> None:
    path = root.local("train/x.npy")
    assert path.read_bytes() == FILES["train/x.npy"]
    other = pickle.loads(pickle.dumps(root))
    assert other.local("train/x.npy") == root.local("train/x.npy") == path
    with other.opened("train/x.npy") as file:
        assert file.read() == FILES["train/x.npy"]
    assert behaviour.sent == 300_000
    assert held(tmp_path / "served") == [path.name]
    assert len(path.name) == 32


def test_files_are_kept_until_they_are_released(root: Root, tmp_path: Path) -> None:
    root = Root(root._arguments[0], str(tmp_path / "cache"), 300_000)
    root.local("train/x.npy")
    assert root.read("train/b-part.bin", 0, 2, whole=True) == b"be"  # without the cache, which has no room
    assert len(held(tmp_path / "served")) == 1
    root.release("train/x.npy")
    assert root.local("train/b-part.bin").read_bytes() == b"between"
    assert held(tmp_path / "served") == [root.local("train/b-part.bin").name]


def test_parts_of_whole_files_are_read_from_the_cache(root: Root, behaviour: Behaviour) -> None:
    content = FILES["train/x.npy"]
    for start in (0, 100_000, 200_000):
        assert root.read("train/x.npy", start, 100_000, whole=True) == content[start : start + 100_000]
    assert root.read("train/x.npy", 299_000, whole=True) == content[299_000:]
    assert behaviour.sent == 300_000
    with pytest.raises(DataError, match=r"x.npy: cut short: expected 2 bytes from byte 299,999 on, found 1$"):
        root.read("train/x.npy", 299_999, 2, whole=True)


def test_a_forked_process_has_a_connection_of_its_own(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    connect, connected = stores.connect, []

    def counted(address: str) -> Any:
        connected.append(os.getpid())
        return connect(address)

    monkeypatch.setattr(stores, "connect", counted)
    root.local("train/x.npy")
    root.read("train/x.npy", 5, 1, whole=True)
    if not (child := os.fork()):
        found = root.read("train/b/part-1.bin"), root.read("train/x.npy", 0, 3, whole=True), root.local("test/y.npy")
        good = (*found[:2], found[2].read_bytes()) == (b"one", FILES["train/x.npy"][:3], b"y")
        os._exit(0 if good and connected == [os.getppid(), os.getpid()] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_file_that_has_changed_is_fetched_anew(folder: Path, root: Root) -> None:
    before = root.local("train/b/part-1.bin"), root.stamp("train/b/part-1.bin")
    file = folder / "bucket/data/train/b/part-1.bin"
    file.write_bytes(b"two")  # of the same size
    later = file.stat().st_mtime_ns + 10**9
    os.utime(file, ns=(later, later))
    other = pickle.loads(pickle.dumps(root))
    assert other.local("train/b/part-1.bin").read_bytes() == b"two"
    assert root.local("train/b/part-1.bin") == before[0]  # whoever has it keeps it
    assert root.stamp("train/b/part-1.bin") != before[1]


def test_a_file_that_changes_while_it_is_fetched_is_fetched_again(
    folder: Path, root: Root, behaviour: Behaviour
) -> None:
    behaviour.gate = threading.Event()
    found: list[bytes] = []
    fetching = threading.Thread(target=lambda: found.append(root.local("train/x.npy").read_bytes()))
    fetching.start()
    behaviour.at_gate.wait()
    file = folder / "bucket/data/train/x.npy"
    file.write_bytes(b"n" * 200_000)
    behaviour.gate.set()
    fetching.join()
    assert found == [b"n" * 200_000]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("status", [500, 503, 429])
def test_whatever_is_asked_for_is_asked_for_again(
    root: Root, behaviour: Behaviour, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    behaviour.status, behaviour.failing = status, 3
    with caplog.at_level(logging.WARNING, "raytorch"):
        assert len(root.find(["train"])) == 5
    assert [message.partition(": ")[0] for message in caplog.messages] == ["s3://***@bucket/data/train"] * 2
    for call in (lambda: root.read("train/x.npy", 5, 10), lambda: root.local("train/x.npy").read_bytes()[5:15]):
        behaviour.failing = 3
        assert call() == FILES["train/x.npy"][5:15]
    assert behaviour.failing == 0


@pytest.mark.usefixtures("impatient")
def test_what_comes_short_is_asked_for_again(root: Root, behaviour: Behaviour) -> None:
    behaviour.short = 2
    assert root.read("train/x.npy", 0, 1000) == FILES["train/x.npy"][:1000]
    behaviour.short = 2
    assert root.local("train/x.npy").read_bytes() == FILES["train/x.npy"]
    assert behaviour.short == 0


@pytest.mark.usefixtures("impatient")
def test_what_a_client_hands_on_short_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [b"abcdef", b"abc", b""]
    file = SimpleNamespace(size=lambda: 6, read_at=lambda size, start: answers.pop())
    client = SimpleNamespace(open_input_file=lambda *_: file)
    monkeypatch.setattr(stores, "fs", SimpleNamespace(FileSystem=client))
    monkeypatch.setattr(stores, "connect", lambda address: (None, "bucket"))
    assert Root("s3://bucket").read("x") == b"abcdef"


def test_what_is_refused_is_told_at_once_and_without_the_key(root: Root, behaviour: Behaviour) -> None:
    behaviour.status, behaviour.failing = 403, 1
    with pytest.raises(StorageError) as caught:
        root.local("train/x.npy")
    assert behaviour.failing == 0
    assert str(caught.value).startswith("s3://***@bucket/data/train/x.npy: the store refuses: ")
    assert "secret" not in f"{caught.value!r} {root} {root.place('x')}"


@pytest.mark.usefixtures("impatient")
def test_a_server_that_is_killed_in_the_middle_and_started_again_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "CHUNK", 10_000)
    read, killed = stores.Store.read, []

    def read_and_kill(store: Any, name: str, start: int, *rest: Any, **more: Any) -> bytes:
        if start == 100_000:
            server.kill()
        return read(store, name, start, *rest, **more)

    def pause(tries: int) -> None:
        killed.append(tries)
        if tries == 3:
            server.start()

    monkeypatch.setattr(stores.Store, "read", read_and_kill)
    monkeypatch.setattr(retries, "pause", pause)
    with S3Process(folder) as server:
        root = Root(server.uri("bucket/data"), str(tmp_path / "cache"), 300_000)
        assert root.local("train/x.npy").read_bytes() == FILES["train/x.npy"]
        assert killed == [1, 2, 3]


def test_a_key_that_a_record_has_not_kept_is_asked_for() -> None:
    with pytest.raises(
        ConfigError, match=r"^data.root: s3://\*\*\*@bucket is without its key, which no record keeps; "
    ):
        Root("s3://***@bucket").find(["train"])


def test_a_scheme_that_nobody_knows_is_told() -> None:
    with pytest.raises(ConfigError, match=r"^data.root: nix://a cannot be opened: Unrecognized filesystem type"):
        Root("nix://a").find(["train"])


def test_what_fsspec_alone_knows_is_read_by_it(tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    for name, content in FILES.items():
        store.pipe(f"/data/{name}", content)
    root = Root("memory://data", str(tmp_path / "cache"), 1_000_000)
    assert [file.name for file in root.find(["train/b"])] == ["train/b/part-1.bin", "train/b/deep/part-2.bin"]
    assert root.read("train/x.npy", 5, 10) == FILES["train/x.npy"][5:15]
    assert root.local("train/x.npy").read_bytes() == FILES["train/x.npy"]
    store.pipe("/data/train/x.npy", b"new")
    assert Root("memory://data", str(tmp_path / "cache"), 1_000_000).local("train/x.npy").read_bytes() == b"new"


NET = """
from torch import nn

def net(hidden, dropout):
    return nn.Sequential(nn.Flatten(), nn.Linear(16, *hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(*hidden, 10))
"""

# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("readers", [0, 2])
def test_a_run_is_the_same_as_from_a_folder(
    folder: Path, tmp_path: Path, readers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = np.random.default_rng(1)
    for split, samples in (("train", 200), ("test", 50)):
        where = folder / "bucket/arrays" / split
        where.mkdir(parents=True)
        np.save(where / "x.npy", draw.normal(size=(samples, 1, 4, 4)).astype(np.float32))
        np.save(where / "y.npy", draw.integers(0, 10, samples))
    model, small = (
        {"name": "net.py:net", "hidden": [32], "dropout": 0.2},
        {"schedule": {"name": "constant"}, "batch_size": 20},
    )
    data = {"name": "arrays", "readers": readers, "cache_folder": str(tmp_path / "cache"), "cache_size": "100 kB"}
    with S3Process(folder) as server, without_ray(tmp_path, monkeypatch):
        Path("net.py").write_text(NET, encoding="utf-8")
        for epochs in (1, 2):  # from its start, and from its checkpoint on
            roots = {"near": str(folder / "bucket/arrays"), "far": server.uri("bucket/arrays")}
            near, far = (
                train(name, model, data=data | {"root": root}, epochs=epochs, **small) for name, root in roots.items()
            )
            assert_bitwise_equal(final(near), final(far))
    assert not [file for file in (tmp_path / "runs").rglob("*") if file.is_file() and b"secret" in file.read_bytes()]
    assert len(held(tmp_path / "served")) == 4


def test_a_store_of_another_kind_is_read_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """moto's, as ours and the client could be wrong in the same way."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        address = uri(server.get_host_and_port()[1], "bucket/data")
        store, _ = fs.FileSystem.from_uri(f"{address}&allow_bucket_creation=true")
        store.create_dir("bucket")
        for name, content in FILES.items():
            with store.open_output_stream(f"bucket/data/{name}") as stream:
                stream.write(content)
        root = Root(address, str(tmp_path / "cache"), 1_000_000)
        assert {file.name: file.size for file in root.find(["."])} == {
            name: len(content) for name, content in FILES.items() if "hidden" not in name
        }
        assert root.read("train/x.npy", 5, 10) == FILES["train/x.npy"][5:15]
        assert root.local("train/x.npy").read_bytes() == FILES["train/x.npy"]
        with pytest.raises(DataError, match="there is no such file"):
            root.read("nix")
    finally:
        server.stop()


# -- keys --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "count"),
    [(5, 5), ("20GB", 20 * 10**9), ("1.5 TiB", 3 * 2**39), ("700 B", 700), ("0.1kB", 100), ("64MiB", 2**26)],
)
def test_the_bound_is_a_number_of_bytes_or_text(size: int | str, count: int) -> None:
    assert from_data({"epochs": 1, "data": {"name": "arrays", "cache_size": size}}).data.cache_bytes == count


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (
            {"cache_size": "20"},
            "data.cache_size: must be a whole number of at least 1 or text such as 20GB or 1.5 TiB or null, not '20'",
        ),
        (
            {"cache_size": 0},
            "data.cache_size: must be a whole number of at least 1 or text such as 20GB or 1.5 TiB or null, not 0",
        ),
        ({"cache_folder": "here"}, "data.cache_folder: must be a path in full or null, not 'here'"),
    ],
)
def test_what_is_no_bound_or_folder_is_told(keys: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_data({"epochs": 1, "data": {"name": "arrays", **keys}})
    assert str(caught.value) == f"the configuration: {told}"
