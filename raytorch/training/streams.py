"""Data sets of Ray Data: its tasks read and transform them on all nodes of the cluster, and each worker takes an equal
share of the stream.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from ray.train.collective import broadcast_from_rank_zero

from raytorch.config.reading_keys import ReadingKeys
from raytorch.datasets.own import is_stream
from raytorch.datasets.requests import Request, Split, moved
from raytorch.distributed.collectives import broadcast
from raytorch.distributed.worker import Worker
from raytorch.errors import ConfigError, DataError, ResourceError

Rows = Mapping[str, "np.ndarray[Any, Any]"]
Tell = Callable[..., None]


class Stream:
    """One split of a ``ray.data.Dataset``. Rows come in the order in which they are read, whichever are asked for.

    A batch is a dictionary of tensors by column, a list where a column is of something else. Every worker has as many
    rows, so that up to ``workers - 1`` at the end are left out of each epoch.
    """

    device = torch.device("cpu")
    """Where it takes indices."""
    facts: dict[str, Any] = {}  # noqa: RUF012
    """A stream says nothing of itself."""
    is_in_order_alone = True
    """No sample of it can be asked for."""

    def __init__(self, data: Any, worker: Worker, tell: Tell) -> None:
        """Made by all workers together; ``tell`` is told of rows that a restart passes over.

        Raises ResourceError if the workers leave no CPU to Ray Data, and DataError for too few rows.
        """
        self._worker, self._tell = worker, tell
        if worker.rank == 0:
            _require_free_cpu()
        rows: int
        rows, shards = _from_rank_zero(lambda: (data.count(), data.streaming_split(worker.world_size, equal=True)))
        self._rows = rows - rows % worker.world_size
        if not self._rows:
            raise DataError(f"data: the pipeline has {rows:,} rows, and {worker.world_size} workers need one each")
        self._shard = shards[worker.rank]

    def __len__(self) -> int:
        return self._rows

    def read(self, requests: Iterable[Request]) -> Iterator[Any]:
        """Batches of as many rows as are asked for, from the place of the first on; all workers read together.

        Raises DataError if the stream ends before.
        """
        requests = iter(requests)
        if (first := next(requests, None)) is None:
            return
        rows = _Rows(self._shard, self._rows // self._worker.world_size)
        try:
            if first.epoch:
                self._pass_over(rows, first)
            for request in chain([first], requests):
                taken = rows.first() if request.is_idle else rows.take(len(request.indices))
                yield moved(_tensors(taken), self._worker.device)
        finally:
            rows.close()

    def _pass_over(self, rows: "_Rows", first: Request) -> None:
        """Read as many rows as were trained on in this epoch before a restart."""
        place = broadcast(torch.tensor(first.place, device=self._worker.device))  # where rank 0 is, the batch begins
        passed = int(place)
        if passed:
            self._tell(stream={"epoch": first.epoch - 1, "rows_passed_over": passed})
            rows.skip(passed // self._worker.world_size)


class _Rows:
    """The rows of a shard, one after the other."""

    def __init__(self, shard: Any, rows: int) -> None:
        self._rows = rows
        self._blocks: Iterator[Rows] = iter(shard.iter_batches(batch_size=None, batch_format="numpy"))
        self._block: Rows = {}
        self._at = self._size = self._read = 0

    def take(self, count: int) -> list[Rows]:
        """So many rows, in parts."""
        parts: list[Rows] = []
        while count:
            if self._at == self._size:
                self._next_block()
            until = min(self._size, self._at + count)
            parts.append({name: column[self._at : until] for name, column in self._block.items()})
            count -= until - self._at
            self._at = until
        return parts

    def first(self) -> list[Rows]:
        """The row that is taken next, or at the end the last one, which stay as they are."""
        while self._at == self._size and self._read + self._size < self._rows:
            self._next_block()
        place = min(self._at, self._size - 1)
        return [{name: column[place : place + 1] for name, column in self._block.items()}]

    def skip(self, count: int) -> None:
        """Read so many rows."""
        while count:
            if self._at == self._size:
                self._next_block()
            step = min(self._size - self._at, count)
            self._at, count = self._at + step, count - step

    def close(self) -> None:
        """Let Ray Data end what it reads."""
        if close := getattr(self._blocks, "close", None):
            close()

    def _next_block(self) -> None:
        self._read += self._size
        block = next(self._blocks, None)
        if block is None:
            raise DataError(
                f"data: the pipeline gave a worker {self._read:,} rows in this epoch, fewer than when they were "
                "counted; let it give as many each time"
            )
        self._block, self._at = block, 0
        self._size = len(next(iter(block.values()), ()))


def stream_of(data: Any, worker: Worker, tell: Tell, keys: ReadingKeys) -> Split | None:
    """The stream of a ``ray.data.Dataset``; None of any other data set. Raises ConfigError for keys that ask for more
    than streams have.
    """
    if not is_stream(data):
        return None
    if keys.readers:
        raise ConfigError("data.readers: a ray.data.Dataset is read by tasks of Ray Data's own; leave readers out")
    if keys.most_skipped:
        raise ConfigError(
            "data.on_error: what fails in a ray.data.Dataset is for Ray Data to skip, see max_errored_blocks of its "
            "DataContext; leave on_error out"
        )
    if worker.tensor > 1:
        raise ConfigError(
            "parallel.tensor: each worker has another share of a ray.data.Dataset, and those that compute products "
            "together need the same samples; leave parallel.tensor out, or give the data set in another form"
        )
    return Stream(data, worker, tell)


def _from_rank_zero(value: Callable[[], Any]) -> Any:
    is_first = ray.train.get_context().get_world_rank() == 0
    return broadcast_from_rank_zero(value() if is_first else None)


def _require_free_cpu() -> None:
    free = ray.available_resources().get("CPU", 0)
    if free < 1:
        there = ray.cluster_resources().get("CPU", 0)
        raise ResourceError(
            f"data: Ray Data reads with tasks of one CPU each, and of the {there:g} CPUs of the cluster the workers "
            f"and others leave {free:g}; take fewer scaling.workers, or less scaling.cpus_per_worker"
        )


def _tensors(parts: list[Rows]) -> dict[str, Any]:
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return {
        name: column.tolist() if column.dtype.kind in "OSU" else torch.from_numpy(column)
        for name, column in columns.items()
    }
