"""Runs from an S3 server that is killed and started again go on, and end with the weights of one from the files.

Their cache on the node's disk has half the size of the data, and is looked at all the time. The server is killed with
SIGKILL in the first epoch, when the first checkpoint is there; it is started again after some seconds, on the same
port. The suite has a small table from tests/s3_server.py; of what is named in
RAYTORCH_KILLED_STORES="shards table" there are tens of megabytes, from that server and from moto's. The latter loses
its objects with its process: one that is started again has been given the same ones before it takes requests, so that
clients see connections that are refused, and no empty store.
"""

import io
import os
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread, Timer
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import s3_by_moto
import s3_server
from image_files import encoded, picture
from pyarrow import parquet
from s3_server import S3Process
from whole_runs import assert_bitwise_equal, weights

from raytorch.config.file import from_data
from raytorch.runs.checkpoint_manifest import checkpoint_names
from raytorch.runs.plan import RunPlan, plan_run
from raytorch.runs.storage import RunFolder
from raytorch.sources.shard_index import write_index
from raytorch.training.driver import run_training


def table(folder: Path, *, files: int, rows: int) -> dict[str, Any]:
    """So many parquet files to train on, of two row groups of so many rows, of 24 columns each."""
    rng = np.random.default_rng(0)
    for split, count in (("train", files), ("test", 2)):
        (folder / split).mkdir(parents=True)
        for file in range(count):
            columns = {f"x{column}": rng.standard_normal(2 * rows, dtype=np.float32) for column in range(24)}
            whole = pa.table(columns | {"target": rng.integers(0, 3, 2 * rows)})
            parquet.write_table(whole, folder / split / f"{file:02}.parquet", row_group_size=rows)
    return {"data": {"name": "table"}, "batch_size": 2 * rows // 5}


def shards(folder: Path, *, files: int, samples: int) -> dict[str, Any]:
    """So many tar files to train on, of so many JPEGs and their classes each."""
    for split, count in (("train", files), ("test", 2)):
        (folder / split).mkdir(parents=True)
        for shard in range(count):
            path = folder / split / f"{shard:02}.tar"
            with tarfile.open(path, "w") as archive:
                for number in range(shard * samples, (shard + 1) * samples):
                    add(archive, f"{number:05}.jpg", encoded(picture(number, 256, 256), "JPEG", quality=95))
                    add(archive, f"{number:05}.cls", str(number % 3).encode())
            write_index(path)
    data = {"name": "shards", "size": 48, "resize": 56, "augment": {"crop": True, "flip": True}}
    return {"data": data, "batch_size": 16}


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


class Case(NamedTuple):
    """A run whose server is killed."""

    make: Callable[[Path], dict[str, Any]]
    """Writes the data into a folder, and answers with keys of the run."""
    server: str
    """The program."""
    outage: float
    """Seconds, more than the six that pyarrow's client bridges by itself."""


LARGE = {
    "shards": lambda folder: shards(folder, files=40, samples=20),
    "table": lambda folder: table(folder, files=40, rows=5_000),
}
SERVERS = {"ours": s3_server.__file__, "moto": s3_by_moto.__file__}
CASES = {"small table": Case(lambda folder: table(folder, files=40, rows=100), SERVERS["ours"], 8.0)} | {
    f"{name} from {server}": Case(LARGE[name], SERVERS[server], 10.0)
    for name in os.environ.get("RAYTORCH_KILLED_STORES", "").split()
    for server in SERVERS
}


class Outage:
    """Looks at a cache while a run goes on, and kills its server in the middle of that.

    Attributes:
        most: Bytes that were in the cache at most.
        removed: How often a file left it.
        removed_before: As often when the server had been started again; None before.
    """

    def __init__(self, cache: Path, run: RunFolder, server: S3Process, seconds: float) -> None:
        self.most = self.removed = 0
        self.removed_before: int | None = None
        self._cache, self._run, self._server = cache, run, server
        self._ended, self._thread = Event(), Thread(target=self._look)
        self._timer = Timer(seconds, self._start_again)

    def __enter__(self) -> "Outage":
        self._cache.mkdir(mode=0o700)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if self._timer.is_alive():
            self._timer.cancel()
            self._timer.join()

    def _look(self) -> None:
        known: set[str] = set()
        has_come = False
        while not self._ended.wait(0.002):
            there = self._held()
            self.most = max(self.most, sum(there.values()))
            whole = {name for name in there if not name.endswith(".part")}
            self.removed += len(known - whole)
            known = whole
            if not has_come and checkpoint_names(self._run):
                has_come = True
                self._server.kill()
                self._timer.start()

    def _start_again(self) -> None:
        self._server.start()
        self.removed_before = self.removed

    def _held(self) -> dict[str, int]:
        """Bytes of the files that were there at a moment."""
        with os.scandir(self._cache) as entries:
            names = [entry.name for entry in entries if entry.name != "lock"]
        held = {}
        for name in names:
            try:
                held[name] = (self._cache / name).stat().st_size
            except FileNotFoundError:  # it has left since
                continue
        return held


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("name", CASES)
def test_the_run_goes_on_when_the_server_does(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    files = tmp_path / "served" / "bucket" / "data"
    run = case.make(files) | {
        "model": {"name": "mlp", "hidden": [32]},
        "shuffle": "blocks",
        "epochs": 3,
        "checkpoint": {"every_steps": 30},
        "precision": "fp32",
        "scaling": {"workers": 2},
        "storage": str(tmp_path / "runs"),
    }
    size = sum(file.stat().st_size for file in files.rglob("*") if file.is_file())

    def planned(name: str, **data: Any) -> RunPlan:
        return plan_run(from_data(run | {"data": run["data"] | {"readers": 1, **data}}), name)

    near = planned("near", root=str(files))
    expected = run_training(near)
    cache = tmp_path / "cache"
    with S3Process(tmp_path / "served", case.server) as server:
        far = planned("far", root=server.uri("bucket/data"), cache_folder=str(cache), cache_size=size // 2)
        begun = time.monotonic()
        with Outage(cache, far.folder, server, case.outage) as outage:
            found = run_training(far)
        took = time.monotonic() - begun
    print(
        f"{name}: {size:,} bytes of data; at most {outage.most:,} in a cache of {size // 2:,}, which {outage.removed} "
        f"files left, {outage.removed_before} of them before the server was there again; {took:.0f} s"
    )
    assert outage.removed_before is not None
    assert outage.removed_before < outage.removed  # it has been read from since
    assert size // 4 < outage.most <= size // 2
    assert (expected["restarts"], found["restarts"]) == (0, 0)
    assert found["metrics"] == expected["metrics"]
    assert_bitwise_equal(weights(near.folder), weights(far.folder))
