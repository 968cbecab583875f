"""``raytorch data check`` and ``show``: what a run would read, without training."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import log_level_kept
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from raytorch.cli.main import app
from raytorch.config import Augment
from raytorch.config.file import from_data
from raytorch.datasets import TrainLoader, checking, load_splits
from raytorch.datasets.own import OwnDataset
from raytorch.datasets.showing import _pictures, look_at
from raytorch.errors import DataError, UserError

CPU = torch.device("cpu")
TABLE = """
import sys

import torch

class Table:
    def __init__(self, split, *, bad: list[int] = [], width: int = 3, opens: bool = True):
        if not opens:
            raise OSError("no such drive")
        self.bad, self.width = (bad if split == "train" else []), width
        self.x = torch.arange(20.0)[:, None].repeat(1, 3)
        self.labels = torch.arange(20) % 2
        self.facts = {"input_shape": [3], "num_classes": 2, "classes": ["cat", "dog"]}

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        if index in self.bad:
            raise ValueError(f"row {index} is broken")
        return self.x[index, : self.width if index == 7 else 3], int(self.labels[index])


class Told(Table):
    def describe(self, batch):
        return [{"first": f"<{row[0]:g}>", "[1]": label} for row, label in zip(*batch)]


class Wrong(Table):
    def describe(self, batch):
        return ["all of it"]


def flow(split):
    return sys.modules["ray.data"].Dataset()


def main(run): ...
"""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "table.py").write_text(TABLE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_file(data: Any, **keys: Any) -> dict[str, Any]:
    """Its content, beside the file."""
    content = {"epochs": 1, "data": data, "model": "mlp", "batch_size": 8} | keys
    Path("run.yaml").write_text(str(content), encoding="utf-8")  # which is YAML as well
    return content


def called(*arguments: str) -> tuple[list[str], Exception | None]:
    """What a command prints, and how it ends."""
    with log_level_kept():
        result = CliRunner().invoke(app, ["-q", "data", *arguments])
    return [line.rstrip() for line in result.stdout.splitlines()], result.exception  # type: ignore[return-value]


# -- check -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("readers", [0, 2])
def test_all_that_cannot_be_read_is_listed_of_each_split(readers: int) -> None:
    data = {"name": "table.py:Table", "bad": [3, 4, 16], "readers": readers}
    run_file(data, validation={"share": 0.25})
    lines, error = called("check", "run.yaml")
    assert isinstance(error, DataError)
    assert str(error) == "run.yaml: 3 of 40 samples cannot be read"
    heads = [line for line in lines if not line.startswith(" ")]
    assert heads == [
        "train       15 samples",
        "validation  5 samples",
        "test        20 samples",
        "model       mlp of 770 parameters",
    ]
    broken = [f"  wrong     sample {index}: ValueError: row {index} is broken" for index in (3, 4, 16)]
    assert sorted(line for line in lines if "wrong" in line) == sorted(broken)
    assert lines[1:5] == [
        '  facts     {"input_shape": [3], "num_classes": 2, "classes": ["cat", "dog"]}',
        "  batch     [0]: float32 (8, 3)",
        "            [1]: int64 (8,)",
        f"  classes   cat: {15 - int(lines[4].rpartition(' ')[2])}, dog: {lines[4].rpartition(' ')[2]}",
    ]


def test_a_run_whose_data_is_in_order() -> None:
    run_file({"name": "digits"}, validation={"share": 0.1})
    lines, error = called("check", "run.yaml", "--set", "seed=3")
    assert error is None
    assert lines[-1] == "all 1,797 samples can be read"
    splits = load_splits(from_data({"epochs": 1, "validation": {"share": 0.1}, "seed": 3}), CPU)
    labels: Any = splits.train
    counts = torch.bincount(labels.labels).tolist()
    assert f"  classes   {', '.join(f'{label}: {count}' for label, count in enumerate(counts))}" in lines


def test_files_of_ones_own_are_opened_where_the_configuration_says(project: Path) -> None:
    for split, rows in (("train", 30), ("test", 10)):
        (project / "files" / split).mkdir(parents=True)
        for field in "xy":
            np.save(project / "files" / split / f"{field}.npy", np.zeros(rows, dtype=np.int16))
    run_file({"name": "arrays", "root": "files"})
    lines, error = called("check", "run.yaml")
    assert (lines[0], lines[-1], error) == ("train       30 samples", "all 40 samples can be read", None)
    assert "  batch     [0]: int16 (8,)" in lines
    _, error = called("check", "run.yaml", "--set", "data.test=gone")
    assert str(error) == (
        "files/gone: expected .npy or .npz or .safetensors files of the data set, found no such file or folder; name "
        "others as data.test, or a share of the training samples: data.test: 0.1"
    )


def test_more_than_are_listed_end_the_reading_of_a_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "MOST_LISTED", 3)
    run_file({"name": "table.py:Table", "bad": list(range(20))})
    lines, error = called("check", "run.yaml")
    assert str(error) == "run.yaml: 4 of 40 samples cannot be read; --all lists each"
    kind, rest = [line for line in lines if "wrong" in line]
    assert re.match(r"  wrong     4 samples: ValueError: row \d+ is broken \(also ValueError: row \d+ is bro", kind)
    assert rest == "  wrong     more than 3 samples cannot be read; it was read no further"
    assert "test        20 samples" in lines


def test_faults_of_one_kind_are_one_line_unless_all_are_asked_for(project: Path) -> None:
    rows = [f"{'' if row % 2 else row},{row % 3}" for row in range(3000)]
    (project / "holes.csv").write_text("\n".join(["area,y", *rows]), encoding="utf-8")
    run_file({"name": "table", "root": ".", "train": "holes.csv", "test": 0.2, "target": "y"})
    lines, error = called("check", "run.yaml")
    assert len(lines) < 20
    first = next(line for line in lines if "wrong" in line)
    assert re.search(r"1,\d{3} samples: \./holes.csv: line [\d,]+: column area: a number is missing; .* \(also ", first)
    assert re.search(r"\(also \./holes.csv: line [\d,]+, \./holes.csv: line [\d,]+, \.\.\.\)$", first)
    assert str(error).endswith("samples cannot be read; --all lists each")
    lines, error = called("check", "run.yaml", "--all")
    assert len([line for line in lines if "wrong     sample" in line]) > 1000
    assert str(error).endswith("samples cannot be read")


def test_a_split_of_which_nothing_can_be_read_is_told_once() -> None:
    run_file({"name": "table.py:Table", "bad": list(range(20))})
    lines, error = called("check", "run.yaml", "--all")
    assert str(error) == "run.yaml: 20 of 40 samples cannot be read"
    assert sorted(line for line in lines if "wrong" in line) == sorted(
        f"  wrong     sample {index}: ValueError: row {index} is broken" for index in range(20)
    )


@pytest.mark.parametrize("command", ["check", "show"])
def test_a_stream_is_looked_at_in_python(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray.data", type("Module", (), {"Dataset": type("Dataset", (), {})}))  # type: ignore[arg-type]
    run_file("table.py:flow")
    _, error = called(command, "run.yaml")
    assert isinstance(error, UserError)
    assert str(error).startswith("data.name: table.py:flow returns a ray.data.Dataset, which tasks of Ray Data read ")


def test_what_is_wrong_with_own_code_is_told_with_its_line() -> None:
    run_file({"name": "table.py:Table", "opens": False})
    _, error = called("check", "run.yaml")
    assert isinstance(error, DataError)
    assert str(error) == "data.name: table.py:9: OSError: no such drive"
    run_file({"name": "table.py:Table", "width": 2})
    lines, error = called("check", "run.yaml")
    assert str(error) == "run.yaml: not all of it can be read"
    assert next(line for line in lines if "wrong" in line).startswith(
        "  wrong     RuntimeError: stack expects each tensor"
    )


def test_text_of_files_commands_no_terminal(project: Path) -> None:
    (project / "table.py").write_text(TABLE.replace("is broken", "is \\x1b[2J"), encoding="utf-8")
    run_file({"name": "table.py:Table", "bad": [3]})
    lines, _ = called("check", "run.yaml")
    assert "  wrong     sample 3: ValueError: row 3 is \\x1b[2J" in lines


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["check", "mnist", "--root", "nowhere"], "nowhere/MNIST/raw/train-images-idx3-ubyte: expected an IDX file"),
        (
            ["check", "mnist", "--set", "epochs=1"],
            "--set changes a configuration, and mnist is a data set; give --root",
        ),
        (["check", "run.yaml", "--root", "x"], "--root goes with mnist or cifar10; of a configuration, change it by"),
        (["check", "gone.yaml"], "gone.yaml: no such file"),
        (["check", "run.yaml", "--set", "data.colour=1"], "override data.colour=1: data.colour: unknown key"),
        (["show", "run.yaml", "--split", "validation"], "the run has no split 'validation', but train, test"),
        (["show", "run.yaml", "--out", "x.png"], "--out is for a picture, and the samples of train are no images"),
        (["show", "loop.yaml"], "table.py:main reads what it likes to; data is looked at where a configuration names"),
        (["check", "loop.yaml"], "table.py:main reads what it likes to; "),
    ],
)
def test_what_cannot_be_looked_at_is_an_error_of_the_input(arguments: list[str], told: str) -> None:
    run_file("table.py:Table")
    Path("loop.yaml").write_text("{loop: 'table.py:main', batch_size: 8}", encoding="utf-8")
    _, error = called(*arguments)
    assert isinstance(error, UserError)
    assert str(error).startswith(told)


def test_no_ray_is_loaded_for_it() -> None:
    code = "import sys, raytorch.datasets.showing; print('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


# -- show --------------------------------------------------------------------------------------------------------------


def test_a_picture_shows_images_as_the_run_trains_on_them() -> None:
    content = run_file({"name": "digits", "augment": {"crop": 2}}, seed=5)
    lines, error = called("show", "run.yaml", "--samples", "10")
    assert error is None
    assert lines[0] == "run-train.png: 10 of train, 4 in a row"
    config = from_data(content)
    loader = TrainLoader(load_splits(config, CPU).train, batch_size=8, seed=5, augment=Augment(crop=2))
    batches = [step[0].content for step, _ in zip(loader.remaining(), range(2), strict=False)]
    images, labels = (torch.cat(parts)[:10] for parts in zip(*batches, strict=True))
    assert [line.split() for line in lines[2:]] == [[str(place), str(int(it))] for place, it in enumerate(labels, 1)]
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    expected = (images - low) / (high - low)
    torch.testing.assert_close(look_at(config, "train", 10).images, expected)
    picture = torch.from_numpy(np.array(Image.open("run-train.png")))[..., 0] / 255
    assert picture.shape == (3 * 66 + 2, 4 * 66 + 2)
    torch.testing.assert_close(picture[70:132:8, 70:132:8], expected[5, 0], rtol=0, atol=0.5 / 255 + 1e-6)


@pytest.mark.parametrize(
    ("images", "shown"),
    [
        (torch.full((2, 3, 4, 5), 51, dtype=torch.uint8), torch.full((2, 3, 4, 5), 0.2)),
        (torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)), None),
        (torch.zeros(2, 3, 4, 4) - 1, torch.zeros(2, 3, 4, 4)),
    ],
)
def test_images_are_shown_in_their_range(images: Tensor, shown: Tensor | None) -> None:
    found = _pictures(images)
    assert found is not None
    torch.testing.assert_close(found, images if shown is None else shown)


def test_the_frames_of_a_clip_stand_side_by_side() -> None:
    clips = torch.rand(2, 1, 3, 4, 5)
    found = _pictures(clips)
    assert found is not None
    assert torch.equal(found, torch.cat(list(clips.unbind(2)), dim=3))
    assert _pictures(torch.rand(2, 4, 9, 9)) is None
    assert _pictures(torch.rand(2, 3, 1, 9)) is None


def test_other_samples_are_a_table_of_their_values() -> None:
    run_file("table.py:Table")
    lines, error = called("show", "run.yaml", "--split", "test", "--samples", "2")
    assert error is None
    assert [line.split() for line in lines] == [
        ["sample", "[0]", "[1]"],
        ["1", "0", "0", "0", "cat"],
        ["2", "1", "1", "1", "dog"],
    ]


def test_a_data_set_says_itself_what_is_shown_of_a_batch() -> None:
    run_file("table.py:Told", validation={"share": 0.2})
    for split in ("train", "test"):
        lines, error = called("show", "run.yaml", "--samples", "3", "--split", split)
        assert error is None
        assert [line.split()[0] for line in lines] == ["sample", "1", "2", "3"]
        assert all(line.split()[1][0] == "<" for line in lines[1:])
    run_file("table.py:Wrong")
    _, error = called("show", "run.yaml")
    assert str(error) == "describe must return a list of 8 dictionaries, one for each sample, not ['all of it']"


def test_samples_that_cannot_be_shown_are_told() -> None:
    run_file({"name": "table.py:Table", "bad": [0, 1, 2, 3, 4]})
    _, error = called("show", "run.yaml", "--samples", "20")
    assert isinstance(error, DataError)
    assert re.fullmatch(r"train: table.py:20: ValueError: row (\d) is broken \(sample \1 of train\)", str(error))
    run_file({"name": "table.py:Table", "bad": [0, 1, 2, 3, 4], "on_error": "skip"})
    lines, error = called("show", "run.yaml", "--samples", "20")
    assert (len(lines), error) == (21, None)


def test_a_shard_that_cannot_be_read_is_tried_once() -> None:
    """And not for each sample of it."""

    class Shard:
        tried = 0

        def __len__(self) -> int:
            return 60

        def __getitem__(self, index: int) -> int:
            self.tried += 1
            if index < 50:
                raise OSError("cut short")
            return index

    shard = Shard()
    split = OwnDataset(shard, CPU, most_skipped=50)
    for _ in range(2):
        assert checking._read_all(from_data({"epochs": 1}), "x", split, lambda *_: None) == (["batch: int64 (60,)"], "")
    assert shard.tried == 50 + 2 * 60


@pytest.mark.parametrize("readers", [0, 2])
def test_samples_that_cannot_be_put_together_are_named_by_their_shapes(readers: int) -> None:
    run_file({"name": "table.py:Table", "width": 2, "readers": readers})
    lines, error = called("check", "run.yaml")
    assert isinstance(error, DataError)
    told = next(line for line in lines if "wrong" in line)
    assert "stack expects each tensor to be equal size" in told
    assert "(sample 7 of train is ([2], int), and sample 0 ([3], int); give the data set a collate(samples)" in told
