"""Data in files goes on with any number of workers: each sample once in every epoch, as a log of indices tells."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from source_files import SAMPLES, SOURCES

from raytorch.config.file import from_data
from raytorch.datasets import MicroBatch, TrainLoader, load_split
from raytorch.datasets.requests import Request, Split
from raytorch.datasets.sampling import blocks_of


class Logged:
    """A split whose batches come with the indices that were asked for."""

    device = torch.device("cpu")
    facts: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, split: Split) -> None:
        self._split = split

    def __len__(self) -> int:
        return len(self._split)

    def read(self, requests: Iterable[Request]) -> Iterator[Any]:
        asked: list[list[int]] = []

        def noted() -> Iterator[Request]:
            for request in requests:
                asked.append(request.indices.tolist())
                yield request

        for number, batch in enumerate(self._split.read(noted())):
            yield asked[number], batch


class Run:
    """What workers read of a split, step by step."""

    def __init__(self, splits: list[Split], blocks: torch.Tensor | None) -> None:
        self._splits, self._blocks = splits, blocks
        [self._whole] = splits[0].read([Request(torch.arange(len(splits[0])), 0, epoch=1)])
        self._state: dict[str, int] | None = None
        self.log: list[list[int]] = [[], [], []]
        """The indices of each epoch."""

    def go_on(self, workers: int, steps: int) -> None:
        """Read so many steps from where it has come to, or to the end of the last epoch, by so many workers."""
        options: Any = {"batch_size": 7, "world_size": workers, "blocks": self._blocks, "seed": 3}
        loaders = [TrainLoader(Logged(self._splits[rank]), rank=rank, **options) for rank in range(workers)]
        for loader in loaders if self._state else ():
            loader.load_state_dict(self._state or {})
        while steps and loaders[0].epoch < len(self.log):
            for step in islice(zip(*(loader.remaining() for loader in loaders), strict=True), steps):
                self._note(step, loaders[0].epoch)
                steps -= 1
            for loader in loaders if loaders[0].position == loaders[0].samples else ():
                loader.next_epoch()
        self._state = loaders[0].state_dict()

    def _note(self, step: tuple[list[MicroBatch], ...], epoch: int) -> None:
        for [micro_batch] in step:
            indices, batch = micro_batch.content
            for content, whole in zip(batch, self._whole, strict=True):
                assert torch.equal(content, whole[torch.tensor(indices)])
            self.log[epoch] += indices if micro_batch.samples else []


@pytest.mark.parametrize(("source", "readers"), [*((name, 0) for name in SOURCES), ("tokens", 1)])
def test_two_workers_then_one_then_three_read_every_sample_once(
    source: str, readers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = SOURCES[source](tmp_path / "data")
    unchanged = {"augment": {}} if "augment" in made["data"] else {}
    config = from_data({"epochs": 3, **made, "data": made["data"] | {"readers": readers} | unchanged})
    splits = [load_split(config, "train", torch.device("cpu")) for _ in range(3)]
    split = splits[0]
    run = Run(splits, blocks_of(split) if config.shuffle == "blocks" else None)
    for workers, steps in ((2, 3), (1, 8), (3, 5), (2, 99)):
        run.go_on(workers, steps)
    assert [sorted(epoch) for epoch in run.log] == [list(range(len(split)))] * 3
    assert len({tuple(epoch) for epoch in run.log}) == 3
    assert len(split) >= SAMPLES["train"]
