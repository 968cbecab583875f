"""Data sets that are read from files of the user's own: their splits, and what is refused of all of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raytorch.config import RunConfig
from raytorch.config.file import from_data
from raytorch.datasets import TrainLoader, load_splits
from raytorch.datasets.requests import Request, Split
from raytorch.datasets.splits import shipped_split
from raytorch.errors import ConfigError, DataError
from raytorch.sources.files import Root

CPU = torch.device("cpu")
ROWS = {"train": 30, "test": 10, "more": 5}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split, rows in ROWS.items():
        folder = tmp_path / split
        folder.mkdir()
        first = 100 * sorted(ROWS).index(split)
        np.save(folder / "x.npy", np.arange(first, first + rows, dtype=np.float32)[:, None].repeat(3, 1))
        np.save(folder / "y.npy", np.arange(first, first + rows))
    return tmp_path


def config(root: Path, run: dict[str, Any] | None = None, **data: Any) -> RunConfig:
    return from_data({"epochs": 1, "data": {"name": "arrays", "root": str(root), **data}, **(run or {})})


def rows(split: Split) -> list[int]:
    [(_, numbers)] = split.read([Request(torch.arange(len(split)), 0, epoch=0)])
    return numbers.tolist()


def test_splits_are_files_below_the_root(root: Path) -> None:
    run = {"validation": {"split": "validation"}}
    splits = load_splits(config(root, run, train=["train", "more"][:1], validation="more"), CPU)
    assert splits.test is not None
    assert [rows(split) for split in (splits.train, splits.judged, splits.test)] == [
        list(range(200, 230)),
        list(range(5)),
        list(range(100, 110)),
    ]


def test_a_share_of_the_training_samples_is_the_test_split_and_another_is_judged_by(root: Path) -> None:
    run = {"validation": {"share": 0.25}, "seed": 3}
    splits = load_splits(config(root, run, test=0.2), CPU)
    assert splits.test is not None
    parts = [rows(split) for split in (splits.train, splits.judged, splits.test)]
    assert [len(part) for part in parts] == [18, 6, 6]
    assert sorted([*parts[0], *parts[1], *parts[2]]) == list(range(200, 230))
    again = load_splits(config(root, run, test=0.2), CPU)
    assert again.test is not None
    assert rows(again.test) == parts[2]
    other = load_splits(config(root, run | {"seed": 4}, test=0.2), CPU)
    assert other.test is not None
    assert rows(other.test) != parts[2]


@pytest.mark.parametrize("readers", [0, 2])
def test_every_sample_is_trained_on_once_in_each_epoch(root: Path, readers: int) -> None:
    splits = load_splits(config(root, test=0.2, readers=readers), CPU)
    loader = TrainLoader(splits.train, batch_size=7)
    for _ in range(2):
        seen = [number for [batch] in loader.remaining() for number in batch.content[1].tolist()]
        assert sorted(seen) == rows(splits.train)
        loader.next_epoch()


def test_a_loop_names_one_as_any_shipped_data_set(root: Path) -> None:
    section = {"name": "arrays", "root": str(root), "test": 0.5}
    train, test = (shipped_split(section, split, CPU, seed=1) for split in ("train", "test"))
    assert sorted(rows(train) + rows(test)) == list(range(200, 230))


@pytest.mark.parametrize(
    ("run", "data", "told"),
    [
        ({}, {"test": 1.5}, "or a number above 0 and below 1, not 1.5\n"),
        ({}, {"test": 0}, "or a number above 0 and below 1, not 0\n"),
        (
            {},
            {"test": None},
            "data.test: must be the name of a file, a folder or a pattern or a list of 1 or more, each",
        ),
        ({}, {"train": []}, "data.train: "),
        ({"validation": {"split": "dev"}}, {}, "data arrays has no split dev; name its files as data.dev"),
        ({"validation": {"split": "validation"}}, {}, "data arrays has no split validation; name its files as data.v"),
        ({"shuffle": "blocks", "sampling": "balanced"}, {}, "shuffle: blocks goes with sampling: each; leave one of "),
    ],
)
def test_what_does_not_go_together_is_told_before_anything_is_read(run: Any, data: Any, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(Path("nowhere"), run, **data)
    assert told in f"{caught.value}\n"


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (
            {"train": "trian"},
            "/trian: expected .npy or .npz or .safetensors files of the data set, found no such file or folder",
        ),
        (
            {"train": "*.csv"},
            "/*.csv: expected .npy or .npz or .safetensors files of the data set, found none among the 6 files there",
        ),
        ({"fields": ["z"]}, "/train: expected z.npy, for data.fields, found x, y"),
    ],
)
def test_files_that_are_not_there_are_named(root: Path, data: Any, told: str) -> None:
    with pytest.raises(DataError) as caught:
        load_splits(config(root, **data), CPU)
    assert str(caught.value) == f"{root}{told}"


def test_an_empty_folder_and_a_wrong_root_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/train").mkdir(parents=True)
    for address, told in (
        (f"{tmp_path}/data", "/data/train: expected .npy files of the data set, found none: that folder is empty"),
        (f"{tmp_path}/gone/data", f"found no folder {tmp_path}/gone"),
        ("dat", f"found no folder {tmp_path}/dat, as data.root is from the current folder"),
        (
            f"{tmp_path}/$DATA/x",
            f"no folder {tmp_path}/$DATA; what begins with $ is not expanded, give the folder itself",
        ),
    ):
        with pytest.raises(DataError) as caught:
            Root(address).find(["train"], [".npy"])
        assert str(caught.value).endswith(told)


def test_numbers_in_braces_are_files_each(tmp_path: Path) -> None:
    names = [f"{shard}-{number:03d}.tar" for shard in range(2) for number in range(8, 12)]
    for name in names:
        (tmp_path / name).touch()
    found = Root(str(tmp_path)).find(["{0..1}-{008..011}.tar"], [".tar"])
    assert [file.name for file in found] == names
    assert [file.name for file in Root(str(tmp_path)).find(["1-{010..011}*"])] == names[-2:]
    with pytest.raises(DataError, match=r"^a{3..1}: expected from 1 to 100,000 numbers in {3..1}, the smallest first$"):
        Root(str(tmp_path)).find(["a{3..1}"])
    with pytest.raises(DataError, match=r"/1-012.tar: expected .*, found no such file or folder$"):
        Root(str(tmp_path)).find(["1-{011..012}.tar"])


def test_a_share_that_leaves_nothing_is_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data.test: 0.01 of 30 training samples is 0, and the rest 30; "):
        load_splits(config(root, test=0.01), CPU)
