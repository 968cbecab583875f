"""Data sets of Ray Data, without Ray: what cannot be done with them."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import ray.data
import torch

from raytorch.config.reading_keys import ReadingKeys
from raytorch.datasets import TrainLoader
from raytorch.datasets.own import is_stream
from raytorch.datasets.requests import Request
from raytorch.datasets.shares import Share
from raytorch.datasets.splits import Part
from raytorch.distributed.worker import Worker
from raytorch.errors import ConfigError, DataError, ResourceError
from raytorch.training import streams
from raytorch.training.streams import Stream, stream_of

WORKER = Worker(rank=0, world_size=1, device=torch.device("cpu"))


class Unread(ray.data.Dataset):
    """One that needs no Ray."""

    def __init__(self) -> None:
        pass

    def __del__(self) -> None:
        pass


class Blocks:
    """What a worker gets of ``streaming_split``, and what that is asked of."""

    def __init__(self, *blocks: list[int], counted: int | None = None) -> None:
        self._blocks, self._counted = blocks, counted

    def count(self) -> int:
        return sum(map(len, self._blocks)) if self._counted is None else self._counted

    def streaming_split(self, count: int, *, equal: bool) -> list["Blocks"]:
        assert equal
        whole = [row for block in self._blocks for row in block]
        return (
            [self]
            if count == 1
            else [Blocks(whole[rank : len(whole) // count * count : count]) for rank in range(count)]
        )

    def iter_batches(self, *, batch_size: None, batch_format: str) -> Any:
        assert (batch_size, batch_format) == (None, "numpy")
        return ({"row": np.array(block), "name": np.array(list(map(str, block)))} for block in self._blocks)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr(streams, "_from_rank_zero", lambda value: value())
    return {}


def requests(*sizes: int, place: int = 0, epoch: int = 1) -> list[Request]:
    return [Request(torch.arange(size), place, epoch) for size in sizes]


def rows(stream: Stream, *sizes: int, **place: int) -> list[list[int]]:
    return [batch["row"].tolist() for batch in stream.read(requests(*sizes, **place))]


def test_batches_are_of_as_many_rows_as_are_asked_for_whatever_the_blocks(told: dict[str, Any]) -> None:
    stream = Stream(Blocks([0, 1, 2], [], [3], [4, 5, 6, 7]), WORKER, told.update)
    assert (len(stream), rows(stream, 2, 3, 3)) == (8, [[0, 1], [2, 3, 4], [5, 6, 7]])
    [batch] = stream.read(requests(2))
    assert batch["name"] == ["0", "1"]
    assert told == {}


def test_after_a_restart_the_rows_before_are_passed_over_and_told(told: dict[str, Any]) -> None:
    stream = Stream(Blocks([0, 1, 2], [3, 4, 5, 6]), WORKER, told.update)
    assert rows(stream, 2, 1, place=4, epoch=3) == [[4, 5], [6]]
    assert told == {"stream": {"epoch": 2, "rows_passed_over": 4}}
    assert rows(stream, 2, place=4, epoch=0) == [[0, 1]]  # evaluation begins at the first


@pytest.mark.parametrize(
    ("samples", "batch_size", "workers", "micro_batches"),
    [(1000, 10, 4, 1), (1000, 128, 3, 1), (10, 4, 1, 4), (1002, 8, 2, 4), (999, 7, 4, 1), (12, 7, 3, 2), (64, 8, 2, 2)],
)
def test_every_worker_trains_on_all_rows_of_its_share_whatever_the_batches(
    told: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    samples: int,
    batch_size: int,
    workers: int,
    micro_batches: int,
) -> None:
    monkeypatch.setattr(streams, "broadcast", lambda place: place * 0 + begin)  # that of rank 0

    def loader(rank: int) -> TrainLoader:
        stream = Stream(Blocks(list(range(samples))), Worker(rank, workers, torch.device("cpu")), told.update)
        split = {"rank": rank, "world_size": workers, "micro_batches": micro_batches}
        return TrainLoader(stream, batch_size=batch_size, **split)

    begin, sizes = 0, []
    for rank in range(workers):
        seen: list[int] = []
        steps, train = [], loader(rank)
        for step in train.remaining():
            steps.append(sum(batch.samples for batch in step))
            assert sum(batch.weight for batch in step) == pytest.approx(1)
            seen += [row for batch in step if batch.samples for row in batch.content["row"].tolist()]
        assert seen == list(range(rank, samples // workers * workers, workers))
        assert len(steps) == train.steps_per_epoch
        sizes.append(steps)
    assert sizes == [sizes[0]] * workers
    begin = workers * sum(sizes[0][:1])
    train = loader(workers - 1)
    train.load_state_dict({"samples": train.samples, "epoch": 0, "position": begin})
    assert [sum(batch.samples for batch in step) for step in train.remaining()] == sizes[0][1:]


def test_a_batch_without_a_row_for_each_worker_is_refused(told: dict[str, Any]) -> None:
    stream = Stream(Blocks([0, 1, 2]), Worker(0, 3, torch.device("cpu")), told.update)
    with pytest.raises(ConfigError, match=r"batch_size \(2\): a stream gives each of 3 workers as many"):
        TrainLoader(stream, batch_size=2, world_size=3)


def test_a_stream_that_ends_before_its_rows_were_there_is_told(told: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"gave a worker 3 rows in this epoch, fewer than when they were counted"):
        rows(Stream(Blocks([0, 1, 2], counted=5), WORKER, told.update), 2, 2)
    with pytest.raises(DataError, match=r"the pipeline has 0 rows, and 1 workers need one each"):
        Stream(Blocks(), WORKER, told.update)


def test_what_a_stream_cannot_do_is_refused(told: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    data = Unread()
    assert is_stream(data)
    assert not is_stream([1, 2])
    with pytest.raises(ConfigError, match=r"data.readers: a ray.data.Dataset is read by tasks of Ray Data's own"):
        stream_of(data, WORKER, told.update, ReadingKeys(readers=1))
    with pytest.raises(ConfigError, match=r"data.on_error: what fails in a ray.data.Dataset is for Ray Data to skip"):
        stream_of(data, WORKER, told.update, ReadingKeys(on_error="skip"))
    stream = Stream(Blocks([0, 1, 2]), WORKER, told.update)
    with pytest.raises(ConfigError, match=r"validation.share: no share can be taken of a stream"):
        Part(stream, Share(3, 1, np.random.SeedSequence(0), is_held_out=True))
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 0.5})
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    with pytest.raises(ResourceError, match=r"of the 2 CPUs of the cluster the workers and others leave 0.5; take few"):
        Stream(Blocks([0]), WORKER, told.update)


def test_what_is_no_stream_is_read_as_any_data_set(told: dict[str, Any]) -> None:
    assert stream_of(SimpleNamespace(), WORKER, told.update, ReadingKeys(readers=2)) is None
