"""Data sets of a user's own: read in the same order, with the same random numbers, whoever reads them."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from raytorch.config import ModelKeys, RunConfig
from raytorch.config.file import from_data
from raytorch.config.reading_keys import ReadingKeys
from raytorch.datasets import TrainLoader, evaluation_batches, load_split
from raytorch.datasets.own import OwnDataset
from raytorch.datasets.splits import shipped_split
from raytorch.errors import ConfigError
from raytorch.models.networks import Architecture

CPU = torch.device("cpu")


class Rows:
    """Numbers, each with noise of its own, and with noise from wherever a data set may draw it."""

    facts = {"inputs": 2}  # noqa: RUF012

    def __init__(self, length: int = 23) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        drawn = [random.random(), np.random.rand(), float(torch.rand(()))]
        return {"index": index, "noise": rng.random(), "drawn": torch.tensor(drawn, dtype=torch.float64)}


class Whole(Rows):
    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return indices, indices * 2


def epochs(data: Any, world_size: int = 1, readers: int = 0, count: int = 2, **options: Any) -> list[dict[str, Tensor]]:
    """What all ranks are given in so many epochs, in the order of the global batches, without what idle ranks read."""
    loaders = [
        TrainLoader(
            OwnDataset(data, CPU, seed=3, readers=readers),
            batch_size=6,
            rank=rank,
            world_size=world_size,
            seed=3,
            **options,
        )
        for rank in range(world_size)
    ]
    seen: list[dict[str, Tensor]] = []
    for _ in range(count):
        for steps in zip(*(loader.remaining() for loader in loaders), strict=True):
            seen += [part.content for parts in steps for part in parts if part.samples]
        for loader in loaders:
            loader.next_epoch()
    return seen


def joined(batches: list[dict[str, Tensor]], noise: str = "noise") -> tuple[list[int], Tensor]:
    return torch.cat([batch["index"] for batch in batches]).tolist(), torch.cat([batch[noise] for batch in batches])


@pytest.mark.parametrize(
    ("world_size", "readers", "micro_batches"), [(1, 2, 1), (2, 0, 1), (3, 0, 2), (2, 1, 2), (7, 0, 1)]
)
def test_samples_and_their_random_numbers_are_the_same_whoever_reads_them(
    world_size: int, readers: int, micro_batches: int
) -> None:
    index, noise = joined(epochs(Rows()))
    others, same = joined(epochs(Rows(), world_size, readers, micro_batches=micro_batches))
    assert others == index
    assert torch.equal(same, noise)
    assert sorted(index[:23]) == sorted(index[23:]) == list(range(23))
    assert noise.unique().numel() == noise.numel()  # each sample of each epoch has its own


def test_what_is_drawn_from_common_generators_is_the_same_for_as_many_workers() -> None:
    _, drawn = joined(epochs(Rows(), 2), "drawn")
    _, again = joined(epochs(Rows(), 2, readers=2), "drawn")
    assert torch.equal(again, drawn)
    assert drawn.unique().numel() == drawn.numel()


def test_a_resumed_loader_goes_on_at_the_exact_next_batch() -> None:
    def loader() -> TrainLoader:
        return TrainLoader(OwnDataset(Rows(), CPU, readers=1), batch_size=6)

    whole, first = [step[0].content for step in loader().remaining()], loader()
    steps = first.remaining()
    next(steps)
    next(steps)
    again = loader()
    again.load_state_dict(first.state_dict())
    rest = [step[0].content for step in again.remaining()]
    assert joined(rest)[0] == joined(whole[2:])[0]
    for noise in ("noise", "drawn"):
        assert torch.equal(joined(rest, noise)[1], joined(whole[2:], noise)[1])


@pytest.mark.parametrize("readers", [0, 1])
def test_the_generator_of_the_models_dropout_is_left_alone(readers: int) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    epochs(Rows(), readers=readers)
    assert torch.equal(torch.rand(3), expected)


def test_evaluation_reads_each_sample_once_with_the_same_numbers() -> None:
    data = OwnDataset(Rows(), CPU)

    def seen(world_size: int) -> Iterator[dict[str, Tensor]]:
        for rank in range(world_size):
            for part in evaluation_batches(data, batch_size=5, rank=rank, world_size=world_size):
                yield part.content

    index, noise = joined(list(seen(1)))
    assert index == list(range(23))
    assert joined(list(seen(3)))[0] == index
    assert torch.equal(joined(list(seen(3)))[1], noise)


def test_whole_batches_and_a_collate_of_ones_own() -> None:
    class Ragged(Rows):
        def __getitem__(self, index: int, rng: Any) -> Any:
            return torch.full((index + 1,), index)

        def collate(self, samples: list[Tensor]) -> dict[str, Tensor]:
            return {
                "index": torch.stack([sample[0] for sample in samples]),
                "lengths": torch.tensor(list(map(len, samples))),
            }

    pairs: Any = epochs(Whole(), count=1)
    assert all(torch.equal(2 * index, double) for index, double in pairs)
    ragged = epochs(Ragged(), count=1)
    assert all(torch.equal(batch["index"] + 1, batch["lengths"]) for batch in ragged)


def test_facts_are_as_they_are_read_again() -> None:
    class Told(Rows):
        facts = {"input_shape": (1, 8, 8), "names": {0: "cat"}}  # noqa: RUF012

    assert OwnDataset(Told(), CPU).facts == {"input_shape": [1, 8, 8], "names": {"0": "cat"}}


def test_a_whole_batch_that_draws_has_numbers_of_its_own() -> None:
    class Noisy(Rows):
        def batch(self, indices: Tensor) -> Tensor:
            return torch.stack([torch.rand(()).double(), torch.tensor(random.random()), torch.tensor(np.random.rand())])

    drawn: Any = [epochs(Noisy(), readers=readers) for readers in (0, 2)]
    assert torch.equal(torch.stack(drawn[0]), torch.stack(drawn[1]))
    assert torch.stack(drawn[0]).unique().numel() == 3 * len(drawn[0])


@pytest.mark.parametrize("begin", [0, 1, 4, 99])
@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: float(torch.rand(())), random.getrandbits])
def test_what_a_data_set_draws_late_follows_from_its_batch_too(begin: int, draw: Any) -> None:
    class Late(Rows):
        def __init__(self) -> None:
            super().__init__()
            self.reads = 0

        def batch(self, indices: Tensor) -> Tensor:
            self.reads += 1
            bits = (8,) if draw is random.getrandbits else ()
            drawn = draw(*bits) if self.reads > begin else 0.0
            return torch.tensor(drawn, dtype=torch.float64)

    class Always(Rows):
        def batch(self, indices: Tensor) -> Tensor:
            bits = (8,) if draw is random.getrandbits else ()
            return torch.tensor(draw(*bits), dtype=torch.float64)

    data = Late()
    drawn: Any = epochs(data)
    expected: Any = epochs(Always())
    assert drawn[:begin] == [0.0] * min(begin, len(drawn))
    assert drawn[begin:] == expected[begin:]
    torch_draws = draw not in (random.random, np.random.rand, random.getrandbits)
    is_read_again = 0 < begin < len(drawn) and not torch_draws
    assert data.reads == len(drawn) + is_read_again


def test_a_model_that_draws_between_two_batches_changes_none_of_them() -> None:
    class Quiet(Rows):
        def batch(self, indices: Tensor) -> Tensor:
            return indices if 5 not in indices else torch.tensor([random.random(), np.random.rand()])

    def read(model: Any) -> list[Tensor]:
        loader = TrainLoader(OwnDataset(Quiet(), CPU), batch_size=2)
        return [(model(), step[0].content)[1] for step in loader.remaining()]

    alone = read(lambda: None)
    beside = read(lambda: (random.random(), np.random.seed(1), torch.rand(())))
    assert all(torch.equal(one, other) for one, other in zip(alone, beside, strict=True))


def test_an_error_that_a_data_set_raises_is_not_asked_for_twice() -> None:
    class Broken(Rows):
        reads = 0

        def batch(self, indices: Tensor) -> Tensor:
            Broken.reads += 1
            if Broken.reads == 3:
                raise ValueError("a damaged file")
            return indices

    with pytest.raises(ValueError, match="a damaged file"):
        epochs(Broken())
    assert Broken.reads == 3


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"__getitem__": lambda self, index: index}, "Odd has no length (__len__), so that a run could not be resumed"),
        ({"__len__": lambda self: 3}, "Odd has neither samples (__getitem__) nor batches (batch)"),
        ({"__len__": lambda self: 0, "batch": lambda self, indices: indices}, "Odd is empty"),
        (
            {"__len__": lambda self: 1, "batch": lambda self, indices: indices, "facts": {"mean": torch.ones(1)}},
            "the facts of Odd must be a dictionary of what JSON has, not {'mean': tensor([1.])}",
        ),
        (
            {"__len__": lambda self: 1, "batch": lambda self, indices: indices, "facts": lambda self: {}},
            "the facts of Odd are a method; put @property above it",
        ),
    ],
)
def test_what_is_no_data_set_is_refused(members: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        OwnDataset(type("Odd", (), members)(), CPU)
    assert str(caught.value).startswith(f"data.name: {message}")


# -- configuration -----------------------------------------------------------------------------------------------------

TABLE = """
import torch
from torch import nn

class Table:
    def __init__(self, split: str, *, root: str = "table", columns: int = 4):
        self.rows = torch.arange(40.0 if split == "train" else 20.0)[:, None].expand(-1, columns)
        self.facts = {"columns": columns, "input_shape": [1, 1, columns], "num_classes": 2}

    def __len__(self):
        return len(self.rows)

    def batch(self, indices):
        return self.rows[indices], indices % 2

class Net(nn.Linear):
    def __init__(self, columns: int, *, width: int = 3):
        super().__init__(columns, 2)
"""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "table.py").write_text(TABLE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(**keys: Any) -> RunConfig:
    return from_data({"epochs": 1, "data": {"name": "table.py:Table", "columns": 6}, **keys})


def test_a_run_on_data_of_ones_own(project: Path) -> None:
    run = config(model="table.py:Net")
    own = run.data.model_dump(exclude=set(ReadingKeys.model_fields))
    assert own == {"name": "table.py:Table", "root": "table", "columns": 6}
    assert run.model.model_dump(exclude=set(ModelKeys.model_fields)) == {"name": "table.py:Net", "width": 3}
    assert (run.metric_names, run.ranking.label, run.most_steps) == ((), "loss", None)
    train, test = load_split(run, "train", CPU), load_split(run, "test", CPU)
    assert (len(train), len(test), train.facts["columns"]) == (40, 20, 6)
    assert config(model="mlp").metric_names == ("accuracy",)


def built(**keys: Any) -> nn.Module:
    run = config(**keys)
    return Architecture.of(run.model, load_split(run, "train", CPU).facts, run.code).build()


def test_facts_take_the_place_of_defaults_and_are_not_to_be_given(project: Path) -> None:
    with (project / "table.py").open("a", encoding="utf-8") as file:
        file.write("\ndef net(hidden: int, columns: int = 4, num_classes: int = 10):\n    ")
        file.write("return nn.Sequential(nn.Linear(columns, hidden), nn.Linear(hidden, num_classes))\n")
    net = built(model={"name": "table.py:net", "hidden": 5})
    assert [tuple(parameter.shape) for parameter in net.parameters()] == [(5, 6), (5,), (2, 5), (2,)]
    assert isinstance(built(model="table.py:Net"), nn.Linear)
    with pytest.raises(ConfigError, match=r"^model.columns: is given by the data, as 6; leave it out$"):
        built(model={"name": "table.py:net", "hidden": 5, "columns": 3})
    with pytest.raises(ConfigError, match=r"^model.hidden: missing; table.py:net requires it$"):
        built(model="table.py:net")
    with pytest.raises(
        ConfigError, match=r"^model.name: mlp has to know input_shape and num_classes, .*; let the data set"
    ):
        Architecture.of(RunConfig(epochs=1).model, {}, None).build()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"data": {"name": "table.py:Table", "colums": 3}},
            "data.colums: unknown key; allowed: name, readers, on_error, max_skipped, root, col",
        ),
        (
            {"data": {"name": "table.py:Table", "readers": -1}},
            "data.readers: must be a whole number of at least 0 and at most 256, not -1",
        ),
        (
            {"data": {"name": "table.py:Table", "readers": 100_000}},
            "data.readers: must be a whole number of at least 0 and at most 256, not 100000",
        ),
        ({"data": "table.py:Tabel"}, "data.name: table.py has no Tabel at its top level (did you mean 'Table'?)"),
        (
            {"model": {"name": "table.py:Net", "widht": 3}},
            "model.widht: unknown key; allowed: name, weights, strict, freeze, checkpointing, columns, width",
        ),
        (
            {"data": "mnits"},
            "data: must be one of digits, mnist, cifar10, moving_mnist, mnist_strips, ",
        ),
    ],
)
def test_mistakes_about_it(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**keys)
    assert str(caught.value).removeprefix("the configuration: ").startswith(message)


@pytest.mark.parametrize(
    ("part", "told"),
    [
        (
            "mnst",
            "run.data: must be one of digits, mnist, cifar10, moving_mnist, mnist_strips, ",
        ),
        ({"name": "mnist", "rot": "/x"}, "run.data.rot: unknown key; allowed: name, train_samples, test_samples, "),
        ({"name": "mnist", "root": 3}, "run.data.root: must be text, not 3"),
        ({"name": "mnist", "root": "x"}, "run.data.root: x must be given in full"),
        ({}, "run.data.name: missing; must be one of digits, "),
        (3, "run.data takes the name of a shipped data set, or its section, not int; a data set of your own is given "),
    ],
)
def test_a_shipped_data_set_that_a_loop_names_wrongly_is_told_as_of_a_configuration(part: Any, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        shipped_split(part, "train", torch.device("cpu"))
    assert str(caught.value).startswith(told)
