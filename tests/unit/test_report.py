"""The picture of a run's curves."""

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from raytorch.errors import RunNotFoundError, UserError
from raytorch.runs.catalog import read_evaluations
from raytorch.runs.curves import scale, write_report
from raytorch.runs.status import Evaluation
from raytorch.runs.storage import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run that has recorded ten lines of training and two evaluations."""
    lines = [
        {"step": n, "epoch": n / 5, "split": "train", "loss": 2 / n, "lr": 0.1 / n, "samples_per_s": 900 + n}
        for n in range(1, 11)
    ]
    lines[0]["samples_per_s"] = None  # type: ignore[assignment] - as before the second step
    lines += [{"step": 5 * n, "epoch": n, "split": "test", "loss": 0.5 / n, "accuracy": 0.4 * n} for n in (1, 2)]
    folder = RunFolder(str(tmp_path / "runs"), "mine_1")
    folder.make()
    folder.write_text("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_picture_shows_curves(folder: RunFolder, tmp_path: Path) -> None:
    out = write_report(folder, tmp_path / "pictures" / "mine.png")
    assert out == str(tmp_path / "pictures" / "mine.png")
    picture = imread(out)[..., :3]
    assert picture.shape == (780, 1200, 3)
    coloured = picture.max(axis=-1) - picture.min(axis=-1) > 0.3
    half = (slice(0, 390), slice(390, None)), (slice(0, 600), slice(600, None))
    for rows in half[0]:
        for columns in half[1]:
            assert coloured[rows, columns].sum() > 300  # a curve in each of the four panels


def test_the_ending_decides_on_the_format(folder: RunFolder, tmp_path: Path) -> None:
    assert Path(write_report(folder, tmp_path / "a.svg")).read_text(encoding="utf-8").startswith("<?xml")
    assert Path(write_report(folder, tmp_path / "a.pdf")).read_bytes().startswith(b"%PDF")


def test_a_picture_is_in_the_runs_folder_if_no_other_place_is_named(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert write_report(folder) == str(tmp_path / "runs" / "mine_1" / "report.png")
    assert imread(write_report(folder)).shape[:2] == (780, 1200)
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([2.0, 0.02, 0.5], "log"),
        ([2.0, 0.03], "linear"),
        ([1.0, 0.0], "linear"),
        ([-1.0, 100.0], "linear"),
        ([], "linear"),
    ],
)
def test_values_that_span_decades_have_a_logarithmic_axis(values: list[float], expected: str) -> None:
    axes = Figure().subplots()
    scale(axes, "y", values)
    assert (axes.get_yscale(), axes.get_xscale()) == (expected, "linear")


def test_a_loss_of_four_decades_and_one_of_few_are_drawn_on_their_own_scales(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    write_report(folder, tmp_path / "a.png")
    lines = [{"step": n, "epoch": n, "split": "train", "loss": 10.0**-n, "lr": 0.1} for n in range(5)]
    folder.write_text("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write_report(folder, tmp_path / "b.png")
    assert [figure.axes[0].get_yscale() for figure in drawn] == ["linear", "log"]


def test_each_metric_has_a_panel(folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    line = {"step": 1, "epoch": 1.0, "split": "test", "time": 2.0, "loss": 0.5, "bleu": 0.1, "$x^$": 0.2}
    folder.write_text("metrics.jsonl", json.dumps(line) + "\n")
    write_report(folder, tmp_path / "a.png")
    drawn[0].draw_without_rendering()
    titles = [axes.get_title() for axes in drawn[0].axes]

    assert titles == ["loss", "test bleu", "test $x^$", ""]
    assert read_evaluations(folder) == [Evaluation(1, 1.0, {"loss": 0.5, "bleu": 0.1, "$x^$": 0.2})]


def test_what_a_loop_of_ones_own_logs_is_drawn_and_what_it_has_not_is_left_out(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    train = {"split": "train", "reward": 1.5, "loss_$a^$": 0.1, "lr_first": 0.1, "lr_$second^$": 0.2}
    lines = [{"step": n, "epoch": n, "time": 1.0, **train} for n in (1, 2)]
    lines.append({"step": 2, "epoch": 2, "split": "test", "score": 3.0})
    folder.write_text("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: drawn.append(self))
    write_report(folder, tmp_path / "a.png")
    drawn[0].draw_without_rendering()
    titles = [axes.get_title() for axes in drawn[0].axes]
    assert titles == ["test score", "train reward", "train loss_$a^$", "learning rate"]
    labels = [text.get_text() for text in drawn[0].axes[-1].get_legend().get_texts()]
    assert labels == ["first", "$second^$"]
    assert all(axes.lines for axes in drawn[0].axes)
    assert not recwarn.list


def test_a_run_without_evaluations_is_drawn_all_the_same(folder: RunFolder, tmp_path: Path) -> None:
    folder.write_text("metrics.jsonl", '{"step": 1, "epoch": 0.1, "split": "train", "loss": 1.0, "lr": 0.1}\n')
    assert Path(write_report(folder, tmp_path / "early.png")).exists()


def test_a_run_without_records_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), "mine")
    folder.make()
    with pytest.raises(RunNotFoundError) as failure:
        write_report(folder, tmp_path / "mine.png")
    assert str(failure.value) == f"{tmp_path}/mine has recorded no metrics yet"


def test_an_unknown_ending_is_refused(folder: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^{tmp_path}/a\.gif2 cannot be written: Format 'gif2' is not supported"):
        write_report(folder, tmp_path / "a.gif2")


def test_a_place_that_cannot_be_written_is_refused(folder: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=rf"^{tmp_path}/file/a\.png cannot be written: .*such as mine_1\.png$"):
        write_report(folder, tmp_path / "file" / "a.png")
