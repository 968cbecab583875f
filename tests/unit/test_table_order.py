"""Tables in files, as runs read them: each row once, each row group once, and the same after a restart."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from lone_runs import final, train, without_ray
from tables import config, frame, opened, write
from whole_runs import assert_bitwise_equal

from raytorch.datasets import TrainLoader, load_splits
from raytorch.datasets.checking import check_splits
from raytorch.datasets.skipping import SkippedSamples
from raytorch.errors import ConfigError, DataError
from raytorch.runs.storage import RunFolder
from raytorch.sources import table_formats

CPU = torch.device("cpu")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "train/a.parquet", frame())
    write(tmp_path / "test/a.parquet", frame(60, seed=1))
    return tmp_path


@pytest.mark.parametrize("readers", [0, 2])
def test_every_row_is_trained_on_once_whoever_reads_it(root: Path, readers: int) -> None:
    write(root / "train/a.parquet", pandas.DataFrame({"x": range(250), "y": np.arange(250) / 2}), rows=16)
    run = {"shuffle": "blocks", "sampling": "each"}
    splits = load_splits(config(root, run, readers=readers, test=0.2), CPU)
    loader = TrainLoader(splits.train, batch_size=7, blocks=splits.train.blocks)  # type: ignore[attr-defined]
    seen = torch.cat([batch.content[0][:, 0] for [batch] in loader.remaining()])
    plain = load_splits(config(root, run, test=0.2), CPU).train
    again = TrainLoader(plain, batch_size=7, blocks=plain.blocks)  # type: ignore[attr-defined]
    assert seen.tolist() == torch.cat([batch.content[0][:, 0] for [batch] in again.remaining()]).tolist()
    assert len(set(seen.tolist())) == len(seen) == 200


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The row groups that are read, by their numbers."""
    numbers: list[int] = []
    read = table_formats.Parquet.read

    def noting(self: Any, number: int, names: list[str]) -> Any:
        numbers.append(number)
        return read(self, number, names)

    monkeypatch.setattr(table_formats.Parquet, "read", noting)
    return numbers


def test_row_groups_are_decoded_once_in_an_epoch_that_is_shuffled_by_blocks(root: Path, decoded: list[int]) -> None:
    write(root / "train/a.parquet", pandas.DataFrame({"x": range(4000), "y": np.arange(4000) / 2}), rows=100)
    splits = load_splits(config(root, test=0.1), CPU)
    assert decoded == []  # as nothing has to be known of the training files
    blocks = splits.train.blocks  # type: ignore[attr-defined]
    for _ in TrainLoader(splits.train, batch_size=64, blocks=blocks).remaining():
        pass
    assert sorted(decoded) == list(range(40))


def test_training_files_are_read_once_for_all_splits(root: Path, decoded: list[int]) -> None:
    write(root / "train/a.parquet", frame(200, seed=5), rows=100)
    load_splits(config(root, {"validation": {"share": 0.2}}, standardize=True), CPU)
    assert decoded == [0, 1]
    write(root / "train/a.parquet", frame(400, seed=5).assign(wide=2.0), rows=100)
    assert opened(root, standardize=True).facts["feature_means"]["wide"] == 2.0


def test_a_full_shuffle_of_many_row_groups_is_warned_of_once(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(root / "train/a.parquet", pandas.DataFrame({"x": range(40_000), "y": np.arange(40_000) / 2}), rows=1000)
    splits = load_splits(config(root, test=0.1), CPU)
    loader = TrainLoader(splits.train, batch_size=64).remaining()
    with caplog.at_level(logging.WARNING, "raytorch"):
        for _ in range(8):
            next(loader)
    [record] = caplog.records
    assert "take shuffle: blocks, or write the table as Arrow IPC without compression" in record.getMessage()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with without_ray(tmp_path, monkeypatch):
        yield tmp_path


def trained(name: str, root: Path) -> RunFolder:
    section = config(root, categories="one_hot", standardize=True).data.model_dump(exclude_defaults=True)
    changes = {"checkpoint": {"every_steps": 3, "keep": 9}, "shuffle": "blocks", "epochs": 2, "batch_size": 64}
    return train(name, data={"name": "table", **section}, **changes)


def test_a_killed_run_ends_with_the_same_bits(root: Path, here: Path) -> None:
    whole, parted = trained("whole", root), trained("parted", root)
    for name in sorted(folder for folder in parted.folders() if folder.startswith("checkpoint"))[1:]:
        parted.delete(name)
    trained("parted", root)
    assert_bitwise_equal(final(whole), final(parted))


def test_a_model_of_images_is_refused_for_rows(root: Path, here: Path) -> None:
    with pytest.raises(ConfigError, match=r"convnet reads images, data table has rows; take data .*, or model mlp$"):
        config(root, {"epochs": 1, "model": "convnet"})


@pytest.mark.parametrize("readers", [0, 1])
def test_a_row_without_a_class_is_not_drawn_but_listed(root: Path, readers: int) -> None:
    rows = frame()
    rows.loc[[3, 77], "y"] = None
    write(root / "train/a.parquet", rows)
    run = {"sampling": "balanced"}
    with pytest.raises(DataError, match=r"a.parquet: row 4: column y: the target is missing"):
        load_splits(config(root, run, test=0.1), CPU)
    skipped = SkippedSamples()
    splits = load_splits(config(root, run, on_error="skip", readers=readers), CPU, skipped=skipped)
    assert [(each.split, each.number) for each in skipped.known.values()] == [("train", 3), ("train", 77)]
    assert all("the target is missing" in each.error for each in skipped.known.values())
    assert splits.weights is not None
    assert torch.nonzero(splits.weights == 0).flatten().tolist() == [3, 77]
    counts = {name: (rows.y == name).sum() for name in ("no", "perhaps", "yes")}
    assert splits.weights[:3].tolist() == [1 / counts[name] for name in rows.y[:3]]
    with pytest.raises(DataError, match="more than 1 sample cannot be read"):
        load_splits(config(root, run, on_error="skip", max_skipped=1), CPU)


def test_what_is_told_of_classes_leaves_such_a_row_out(root: Path) -> None:
    rows = frame(60, seed=1)
    rows.loc[[5], "y"] = None
    write(root / "test/a.parquet", rows)
    [_, checked] = check_splits(config(root))
    assert [each.number for each in checked.unreadable] == [5]
    assert sum(checked.classes.values()) == 59
