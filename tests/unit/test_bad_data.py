"""Samples that cannot be read: told with where they are, or skipped for others that follow from the order alone."""

import json
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lone_runs import Monitor, final, follow, train, without_ray
from rich.console import Console
from torch import Tensor
from whole_runs import assert_bitwise_equal

from raytorch.cli.progress import print_summary
from raytorch.config.file import from_data
from raytorch.datasets import TrainLoader, evaluation_batches
from raytorch.datasets.own import OwnDataset
from raytorch.datasets.requests import Request
from raytorch.datasets.shares import Share
from raytorch.datasets.skipping import SkippedSamples
from raytorch.datasets.splits import Part
from raytorch.errors import ConfigError, DataError, message_of
from raytorch.runs.checkpoint_manifest import latest_checkpoint
from raytorch.runs.plan import RunPlan, placed
from raytorch.runs.skipped_list import SKIPPED_FILE, SkippedList
from raytorch.runs.status import RunStatus
from raytorch.runs.storage import RunFolder
from raytorch.training.monitor import RunMonitor
from raytorch.training.run_record import RunRecord

CPU = torch.device("cpu")
BAD = {4, 5, 11, 22}  # two that follow one another, and the last


class Rows:
    """Of which some cannot be read."""

    def __init__(self, length: int = 23) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int, rng: Any) -> dict[str, Any]:
        if index in BAD:
            raise ValueError(f"row {index} is\nbroken")
        return {"index": index, "noise": rng.random()}


class Whole:
    """The same as whole batches."""

    def __len__(self) -> int:
        return 23

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        if bad := sorted(BAD & set(indices.tolist())):
            raise DataError(f"rows.bin: row {bad[0]} is broken")
        return {"index": indices}


def loaders(data: Any, world_size: int = 1, readers: int = 0, most: int = 9, **options: Any) -> list[TrainLoader]:
    """Of each rank."""
    return [
        TrainLoader(
            OwnDataset(data, CPU, seed=3, readers=readers, most_skipped=most),
            batch_size=6,
            rank=rank,
            world_size=world_size,
            seed=3,
            **options,
        )
        for rank in range(world_size)
    ]


def epochs(data: Any, *ranks: Any, begin: dict[str, Any] | None = None, **options: Any) -> list[dict[str, Tensor]]:
    """What all ranks are given in two epochs, in the order of the global batches, from a place in them on."""
    each, seen = loaders(data, *ranks, **options), []
    for loader in each:
        loader.load_state_dict(begin or loader.state_dict())
    while each[0].epoch < 2:
        for steps in zip(*(loader.remaining() for loader in each), strict=True):
            seen += [part.content for parts in steps for part in parts if part.samples]
        for loader in each:
            loader.next_epoch()
    return seen


def joined(batches: list[dict[str, Tensor]], key: str = "index") -> list[float]:
    return torch.cat([batch[key] for batch in batches]).tolist()


def test_the_next_sample_takes_the_place_of_one_that_cannot_be_read() -> None:
    instead = {4: 6, 5: 6, 11: 12, 22: 0}
    order = joined([{"index": loader.content["index"]} for loader in _without_errors()])
    seen = epochs(Rows())
    assert joined(seen) == [instead.get(int(index), index) for index in order]
    assert len(set(joined(seen, "noise"))) == 46  # each place of an epoch has random numbers of its own


def _without_errors() -> Iterator[Any]:
    class All(Rows):
        def __getitem__(self, index: int, rng: Any) -> dict[str, Any]:
            return {"index": index}

    [loader] = loaders(All())
    for _ in range(2):
        for [part] in loader.remaining():
            yield part
        loader.next_epoch()


@pytest.mark.parametrize("data", [Rows(), Whole()], ids=["samples", "batches"])
@pytest.mark.parametrize(("world_size", "readers", "micro_batches"), [(1, 2, 1), (2, 0, 1), (3, 0, 2), (2, 1, 2)])
def test_it_is_the_same_whoever_reads(data: Any, world_size: int, readers: int, micro_batches: int) -> None:
    whole, parts = epochs(data), epochs(data, world_size, readers, micro_batches=micro_batches)
    for key in whole[0]:
        assert joined(parts, key) == joined(whole, key)
    assert joined(epochs(data, begin={"samples": 23, "epoch": 1, "position": 12})) == joined(whole)[35:]


def test_evaluation_has_as_many_samples() -> None:
    data = OwnDataset(Rows(), CPU, most_skipped=9)
    shares = [list(evaluation_batches(data, batch_size=5, rank=rank, world_size=2)) for rank in range(2)]
    seen = [index for share in shares for part in share for index in part.content["index"].tolist()]
    assert seen == [0, 1, 2, 3, 6, 6, *range(6, 11), 12, *range(12, 22), 0]
    assert sum(part.samples for share in shares for part in share) == 23


def test_another_sample_is_of_the_same_share_of_the_split() -> None:
    """None that judges is trained on in the place of one that cannot be read, and none the other way."""
    data = OwnDataset(Rows(), CPU, most_skipped=9)
    first, second = np.random.SeedSequence(7), np.random.SeedSequence(2)
    for is_held_out in (True, False):
        outer = Share(23, 8, first, is_held_out=is_held_out)
        inner = Share(len(outer), 3, second, is_held_out=not is_held_out)
        samples = outer.at(inner.at(torch.arange(len(inner)))).tolist()
        split = Part(Part(data, outer), inner)
        [batch] = split.read([Request(torch.arange(len(split)), 0, epoch=0)])
        assert BAD & set(samples)
        following = dict(zip(samples, [*samples[1:], samples[0]], strict=True))
        for index, found in zip(samples, batch["index"].tolist(), strict=True):
            while index in BAD:
                index = following[index]
            assert found == index


def test_a_sample_of_weight_0_takes_no_place() -> None:
    rows = Rows()
    rows.weights = torch.tensor([1.0] * 23).index_fill(0, torch.tensor([6, 7, 0]), 0.0)  # type: ignore[attr-defined]
    [batch] = OwnDataset(rows, CPU, most_skipped=9).read([Request(torch.tensor([5, 22, 10]), 0, epoch=1)])
    assert batch["index"].tolist() == [8, 1, 10]


@pytest.mark.parametrize("readers", [0, 1])
@pytest.mark.parametrize(
    ("data", "error"), [(Rows(), "ValueError: row {} is broken"), (Whole(), "rows.bin: row {} is broken")]
)
def test_each_is_told_once_in_a_line(data: Any, error: str, readers: int) -> None:
    skipped = SkippedSamples()
    split = OwnDataset(data, CPU, readers=readers, name="train", most_skipped=4, skipped=skipped)
    for _ in range(2):
        list(evaluation_batches(split, batch_size=10))
    assert sorted(skipped.known.values()) == [("train", index, error.format(index)) for index in sorted(BAD)]


@pytest.mark.parametrize("readers", [0, 2])
@pytest.mark.parametrize("data", [Rows(), Whole()], ids=["samples", "batches"])
def test_more_than_may_be_skipped_end_it(data: Any, readers: int) -> None:
    split = OwnDataset(data, CPU, readers=readers, name="train", most_skipped=3)
    with pytest.raises(DataError) as caught:
        list(evaluation_batches(split, batch_size=4))
    told = "more than 3 samples cannot be read (data.max_skipped); the last: sample 22 of train: "
    assert str(caught.value).startswith(told)


def test_a_data_set_of_which_nothing_can_be_read_ends() -> None:
    with pytest.raises(DataError, match=r"^more than 3 samples cannot be read "):
        list(evaluation_batches(OwnDataset(_None(), CPU, most_skipped=3), batch_size=2))
    told = "train: no sample is left that can be read; the last: KeyError: 5"
    with pytest.raises(DataError, match=f"^{told}$"):
        list(evaluation_batches(OwnDataset(_None(), CPU, name="train", most_skipped=50), batch_size=2))


class _None(Rows):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:  # type: ignore[override]
        raise KeyError(index)


def test_what_is_wrong_with_a_batch_and_with_no_sample_of_it_is_raised() -> None:
    class Pairs(Rows):
        def batch(self, indices: Tensor) -> Tensor:
            if len(indices) > 1:
                raise ValueError("of different lengths")
            return indices

    with pytest.raises(ValueError, match="of different lengths"):
        list(evaluation_batches(OwnDataset(Pairs(), CPU, most_skipped=9), batch_size=5))


@pytest.mark.parametrize("readers", [0, 1])
def test_the_error_that_ends_a_run_says_of_which_sample_it_is(readers: int) -> None:
    with pytest.raises(ValueError, match="row 4 is") as caught:
        list(evaluation_batches(OwnDataset(Rows(), CPU, name="test", readers=readers), batch_size=10))
    assert message_of(caught.value).endswith("row 4 is\nbroken\nsample 4 of test")

    class Several(Rows):
        def batch(self, indices: Tensor) -> Tensor:
            raise KeyError(int(indices[0]))

    with pytest.raises(KeyError) as found:
        list(evaluation_batches(OwnDataset(Several(), CPU, name="test", readers=readers), batch_size=9))
    assert message_of(found.value) == "0\none of 9 samples, 0, 1, 2, 3, 4, 5, 6, 7, ..., of test"
    with pytest.raises(DataError) as own:
        list(evaluation_batches(OwnDataset(Whole(), CPU, name="test", readers=readers), batch_size=9))
    assert message_of(own.value) == "rows.bin: row 4 is broken"


# -- runs --------------------------------------------------------------------------------------------------------------

TABLE = """
import torch

class Table:
    facts = {"input_shape": [1, 1, 3], "num_classes": 2}

    def __init__(self, split, *, bad: list[int] = []):
        self.bad = bad if split == "train" else []
        self.x = torch.randn(60, 3, generator=torch.Generator().manual_seed(len(split)))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        if index in self.bad:
            raise ValueError(f"row {index} is broken")
        return self.x[index].view(1, 1, 3), int(self.x[index].sum() > 0)

def main(run, *, bad: list[int] = []):
    net = run.model("model", torch.nn.Linear(3, 2))
    for x, y in run.batches(Table("train", bad=bad), epochs=1, max_skipped=2):
        run.backward(torch.nn.functional.cross_entropy(net(x.flatten(1)), y))
    list(run.read(Table("train", bad=bad), max_skipped=2))
    list(run.share(Table("train", bad=bad), max_skipped=2))
"""


class Actor(Monitor):
    """One that answers as a run's does."""

    def __init__(self) -> None:
        super().__init__()
        self.actor = RunMonitor()
        self.skipped = SimpleNamespace(remote=self.actor.skipped)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "table.py").write_text(TABLE, encoding="utf-8")
    with without_ray(tmp_path, monkeypatch):
        yield tmp_path


def data(*bad: int, **keys: Any) -> dict[str, Any]:
    return {"data": {"name": "table.py:Table", "bad": list(bad), "on_error": "skip", **keys}, "batch_size": 8}


def test_a_resumed_run_ends_with_the_same_bits_and_lists_each_sample_once(project: Path) -> None:
    bad, whole_run, parted_run = (3, 4, 17, 50), Actor(), Actor()
    whole = train("whole", told=whole_run, epochs=2, **data(*bad))
    saving = {"checkpoint": {"every_steps": 5, "keep": 9}, "epochs": 2}
    parted = train("parted", told=parted_run, **saving, **data(*bad))
    parted.delete(str(latest_checkpoint(parted)))
    assert latest_checkpoint(parted) == "checkpoint_00000015"  # in the middle of the second epoch
    train("parted", told=parted_run, **saving, **data(*bad, readers=1))
    assert latest_checkpoint(parted) == latest_checkpoint(whole)
    assert_bitwise_equal(final(whole), final(parted))
    for run in (whole_run, parted_run):
        listed = run.actor.skipped_after(0)
        assert sorted(listed) == [("train", index, f"ValueError: row {index} is broken") for index in bad]
        assert run.actor.status().skipped == 4


def test_more_than_may_be_skipped_over_all_workers_end_the_run(project: Path) -> None:
    """Of which each has a few of its own."""
    told = Actor()
    told.actor.skipped([("train", 58, "another worker's"), ("train", 3, "this one's as well")])
    with pytest.raises(DataError) as caught:
        train("many", told=told, epochs=1, **data(3, 17, max_skipped=2))
    folder = RunFolder("runs", "many")
    assert str(caught.value) == (
        "more than 2 samples cannot be read (data.max_skipped); the last: sample 17 of train: ValueError: row 17 is "
        f"broken; all that were met are listed in {folder}/skipped.jsonl"
    )


def test_a_loop_says_how_many_of_its_own_may_be_skipped(project: Path) -> None:
    for bad, is_too_many in (((3, 17), False), ((3, 17, 5), True)):
        loop = {"name": "table.py:main", "bad": list(bad)}
        config = from_data({"loop": loop, "batch_size": 8, "name": f"own{len(bad)}"})
        told, plan = Actor(), RunPlan(placed(config, config.name, "runs"))
        plan.folder.make()
        if is_too_many:
            with pytest.raises(DataError, match=r"^more than 2 samples cannot be read"):
                follow(plan, told)
        else:
            follow(plan, told)
            assert sorted(told.actor.skipped_after(0))[0] == ("Table", 3, "ValueError: row 3 is broken")
            assert told.actor.status().skipped == 2


def test_the_list_and_the_summary_go_on_over_restarts(project: Path) -> None:
    config = from_data({"epochs": 1, "model": "mlp", "name": "listed", **data()})
    plan, actor = RunPlan(placed(config, "listed", "runs")), RunMonitor()
    plan.folder.make()
    outcome = {"state": "finished", "metrics": {}, "seconds": {}, "first_step_at": None}
    for more in (
        [("train", 3, "x"), ("test", 3, "s3://key:secret@bucket/b.jpg is broken")],
        [("train", 3, "x"), ("train", 9, "z")],
    ):
        record, actor = RunRecord(plan), RunMonitor()
        with record.writing():
            actor.skipped(record.skipped.read())
            actor.skipped(more)
            record.list_skipped(actor.status(), actor.skipped_after)
            record.list_skipped(actor.status(), actor.skipped_after)
            summary = record.end(RunStatus(outcome=outcome, attempts=1))
    lines = [json.loads(line) for line in plan.folder.read_bytes(SKIPPED_FILE).splitlines()]
    assert [tuple(line.values()) for line in lines] == [
        ("train", 3, "x"),
        ("test", 3, "s3://***@bucket/b.jpg is broken"),
        ("train", 9, "z"),
    ]
    assert summary["skipped"] == 3
    console = Console(record=True, width=200, file=StringIO())
    print_summary(console, summary)
    assert "skipped   3 samples that cannot be read: runs/listed/skipped.jsonl" in console.export_text()


def test_lines_that_are_none_of_the_list_are_left_out(project: Path) -> None:
    folder = RunFolder("runs", "odd")
    folder.make()
    folder.write_text(SKIPPED_FILE, '{"split": "train", "index": 1, "error": "x"}\n{}\n[1]\n\0\n{"split": 1}\n"a')
    found = SkippedList(folder)
    assert found.read() == [("train", 1, "x")]
    assert found.count == 1


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"on_error": "ignore"}, "data.on_error: must be one of stop, skip, not 'ignore'"),
        ({"max_skipped": 0}, "data.max_skipped: must be a whole number of at least 1"),
    ],
)
def test_mistakes_about_the_keys(project: Path, keys: dict[str, Any], told: str) -> None:
    for part in ({"name": "arrays"}, {"name": "table.py:Table"}):
        with pytest.raises(ConfigError) as caught:
            from_data({"epochs": 1, "data": {**part, **keys}})
        assert told in str(caught.value)


@pytest.mark.parametrize("key", ["readers", "on_error", "max_skipped"])
def test_a_parameter_of_the_name_of_a_key_is_refused(project: Path, key: str) -> None:
    (project / "table.py").write_text(f"def table(split, {key}=1): ...\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=f"has a parameter '{key}' .*, which is a key of raytorch's own; rename it"):
        from_data({"epochs": 1, "data": "table.py:table"})
