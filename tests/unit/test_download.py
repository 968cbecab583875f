"""Downloads from a real server, of this machine, that serves wrongly in every way it can."""

import hashlib
import time

import pytest
from file_server import FileServer

from raytorch.datasets import download
from raytorch.datasets.download import RemoteFile, fetch
from raytorch.datasets.preparation import MNIST

CONTENT = bytes(range(256)) * 10
NOWHERE = "http://127.0.0.1:9/"


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(download, "_PAUSES_S", (0, 0, 0))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def published(*mirrors: str) -> RemoteFile:
    return RemoteFile("file.gz", len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), mirrors)


def fetched(tmp_path, *mirrors: str) -> list[int]:
    """Fetch the file from ``mirrors``, which has to succeed; answers the sizes that were reported on the way."""
    sizes = []
    fetch(published(*mirrors), tmp_path / "part", lambda name, there, size: sizes.append(there))
    assert (tmp_path / "part").read_bytes() == CONTENT
    return sizes


def refused(tmp_path, *mirrors: str) -> str:
    with pytest.raises(OSError) as caught:  # noqa: PT011
        fetch(published(*mirrors), tmp_path / "part", lambda *_: None)
    return str(caught.value)


def test_a_file_is_downloaded(tmp_path):
    with FileServer({"file.gz": CONTENT}) as server:
        assert fetched(tmp_path, server.url)[-1] == len(CONTENT)
    assert server.requests == [("file.gz", None)]


def test_an_interrupted_download_goes_on(tmp_path):
    with FileServer({"file.gz": CONTENT}, cut=1000) as server:
        fetched(tmp_path, server.url)
    assert server.requests == [("file.gz", None), ("file.gz", "bytes=1000-"), ("file.gz", "bytes=2000-")]


def test_another_mirror_goes_on(tmp_path):
    with FileServer({"file.gz": CONTENT}, cut=1000) as first, FileServer({"file.gz": CONTENT}) as second:
        fetched(tmp_path, first.url, second.url)
    assert second.requests == [("file.gz", "bytes=1000-")]


def test_a_server_without_ranges_starts_again(tmp_path):
    (tmp_path / "part").write_bytes(CONTENT[:1000])
    with FileServer({"file.gz": CONTENT}, ranges=False) as server:
        fetched(tmp_path, server.url)
    assert server.requests == [("file.gz", "bytes=1000-")]


@pytest.mark.parametrize("length", [1, 1000, len(CONTENT), 2 * len(CONTENT)])
def test_wrong_bytes_of_an_earlier_download_are_not_kept(tmp_path, length):
    (tmp_path / "part").write_bytes(b"x" * length)
    with FileServer({"file.gz": CONTENT}) as server:
        fetched(tmp_path, server.url)
    assert server.requests[-1] == ("file.gz", None)


def test_what_is_whole_is_not_asked_for(tmp_path):
    (tmp_path / "part").write_bytes(CONTENT)
    fetched(tmp_path, NOWHERE)


WRONG = {
    "not found": FileServer({}),
    "wrong bytes": FileServer({"file.gz": CONTENT[::-1]}),
    "too short": FileServer({"file.gz": CONTENT[:-1]}),
    "wrong and cut off": FileServer({"file.gz": CONTENT[::-1]}, cut=500),
    "no HTTP": FileServer({}, answer=lambda stream: stream.write(b"nonsense\r\n")),
    "no length": FileServer({}, answer=lambda stream: stream.write(b"HTTP/1.0 200 OK\r\n\r\nabc")),
    "closes at once": FileServer({}, answer=lambda stream: None),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_second_mirror_serves_when_the_first_does_not(tmp_path, name):
    with WRONG[name] as first, FileServer({"file.gz": CONTENT}) as second:
        fetched(tmp_path, first.url, second.url)
    assert len(first.requests) == 1


def test_the_second_mirror_serves_when_nobody_answers_at_the_first(tmp_path):
    with FileServer({"file.gz": CONTENT}) as server:
        fetched(tmp_path, NOWHERE, server.url)


def test_a_server_that_hangs_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_TIMEOUT_S", 0.1)
    hangs = FileServer({}, answer=lambda stream: time.sleep(1))
    with hangs as first, FileServer({"file.gz": CONTENT}) as second:
        fetched(tmp_path, first.url, second.url)


def test_no_more_than_the_file_is_taken(tmp_path):
    with FileServer({"file.gz": CONTENT + bytes(2**24)}) as server:
        assert max(fetched(tmp_path, server.url)) == len(CONTENT)


def test_every_mirror_is_named_with_its_reason(tmp_path):
    with FileServer({}) as first, FileServer({"file.gz": CONTENT[::-1]}) as second:
        message = refused(tmp_path, first.url, second.url, NOWHERE)
    assert f"{first.url}file.gz: HTTP Error 404" in message
    assert f"{second.url}file.gz: serves other bytes than those published" in message
    assert f"{NOWHERE}file.gz: <urlopen error" in message
    assert len(first.requests) == 3
    assert not (tmp_path / "part").exists()


def test_the_real_mnist_has_the_sums_that_are_wanted(mnist_archives):
    assert all(remote.is_in(archive) for remote in MNIST for archive in mnist_archives if remote.name == archive.name)
    assert {remote.name for remote in MNIST} == {archive.name for archive in mnist_archives}
