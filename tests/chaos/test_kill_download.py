"""A download that is killed half-way leaves nothing that looks whole, and the next one goes on with it."""

import time

import pytest
from file_server import FileServer
from preparing import contents, preparing, remotes, small_mnist

from raytorch.config import MnistData
from raytorch.datasets import files


@pytest.mark.parametrize("ranges", [True, False], ids=["resumed", "from the start"])
def test_a_killed_download(tmp_path, monkeypatch, ranges):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    part = tmp_path / "data" / ".download" / "train-images-idx3-ubyte.gz"
    with FileServer(small_mnist(tmp_path / "original"), ranges=ranges, pace_s=0.3) as server:
        published = remotes(server.files, server.url)
        process = preparing(tmp_path / "data", published)
        try:
            wait_for(lambda: part.exists() and part.stat().st_size > 0)
        finally:
            process.kill()
            process.communicate()
        there = part.stat().st_size
        assert 0 < there < len(server.files[part.name])
        assert not (tmp_path / "data" / "MNIST" / "raw" / part.stem).exists()
        assert files.missing(MnistData(root=str(tmp_path / "data")))

        server.pace_s = 0
        server.requests.clear()
        process = preparing(tmp_path / "data", published)
        assert process.communicate(timeout=30)[1] == ""
    assert contents(tmp_path / "data") == contents(tmp_path / "original")
    assert (part.name, f"bytes={there}-") in server.requests


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
