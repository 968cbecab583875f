"""Scaling studies: what is planned, what comes of the numbers, how it is shown. No run starts here."""

from contextlib import nullcontext
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib.image import imread
from rich.console import Console

from raytorch.cluster.capacity import workers_that_fit
from raytorch.config import RunConfig
from raytorch.errors import ConfigError, RunExistsError, TrainingError, UserError
from raytorch.runs.storage import RunFolder
from raytorch.scaling import results_table
from raytorch.scaling.picture import write_picture
from raytorch.scaling.study import Study, compared, measured, plan_study, run_study


def configs(study: Study) -> list[RunConfig]:
    return [plan.config for plan in study.plans]


# -- planning ----------------------------------------------------------------------------------------------------------


def test_weak_scaling_leaves_each_worker_its_batch(small_config: Path, tmp_path: Path) -> None:
    study = plan_study(small_config, [4, 1, 2, 2], out=tmp_path / "study")  # the file: 64 samples for two workers
    assert [(config.scaling.workers, config.batch_size) for config in configs(study)] == [(1, 32), (2, 64), (4, 128)]
    assert [str(plan.folder) for plan in study.plans] == [f"{tmp_path}/study/workers-{size}" for size in (1, 2, 4)]
    assert not (tmp_path / "study").exists()


def test_strong_scaling_divides_one_batch(small_config: Path) -> None:
    study = plan_study(small_config, [1, 8], mode="strong")
    assert [(config.scaling.workers, config.batch_size) for config in configs(study)] == [(1, 64), (8, 64)]


def test_a_study_lies_in_the_runs_storage(small_config: Path, tmp_path: Path) -> None:
    (plan,) = plan_study(small_config, [1]).plans
    assert str(plan.folder).startswith(f"{tmp_path}/runs/small-scale-20")


def test_runs_are_long_enough_and_keep_their_schedule(small_config: Path) -> None:
    def steps(wanted: int) -> set[tuple[int | None, int | None]]:
        study = plan_study(small_config, [1, 8], overrides=["schedule.warmup_steps=70"], warmup=10, steps=wanted)
        return {(config.epochs, config.steps) for config in configs(study)}

    assert steps(20) == {(None, 72)}  # three epochs of the file, though eight workers would take nine steps
    assert steps(100) == {(None, 111)}


def test_overrides_come_first(small_config: Path) -> None:
    study = plan_study(small_config, [2], overrides=["batch_size=100", "scaling.workers={min: 1, max: 4}"])
    assert [(config.scaling.workers, config.batch_size) for config in configs(study)] == [(2, 50)]


def test_sizes_that_cannot_be_run_are_refused(small_config: Path) -> None:
    for sizes in ([], [0, 1]):
        with pytest.raises(UserError, match=r"^workers: must be numbers of at least 1, such as 1,2,4,8$"):
            plan_study(small_config, sizes)
    with pytest.raises(ConfigError, match=r"batch_size \(64\) must be at least workers x accumulate \(65 x 1 = 65\)"):
        plan_study(small_config, [1, 65], mode="strong")


def test_a_folder_that_holds_a_study_is_refused(small_config: Path, tmp_path: Path) -> None:
    (tmp_path / "study" / "workers-1").mkdir(parents=True)
    with pytest.raises(RunExistsError, match=rf"^{tmp_path}/study exists already; give another folder$"):
        plan_study(small_config, [1], out=tmp_path / "study")


def test_a_folder_that_another_study_has_taken_meanwhile_is_left_as_it_is(
    small_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raytorch.scaling.study.ray_for", lambda *_, **__: nullcontext())
    first = plan_study(small_config, [1], out=tmp_path / "study")
    with first.folder.claimed(), pytest.raises(RunExistsError, match="is being run by another process"):
        run_study(planned := plan_study(small_config, [2], out=tmp_path / "study"))
    (tmp_path / "study/scaling.json").write_text("{}", encoding="utf-8")
    with pytest.raises(RunExistsError, match=rf"^{tmp_path}/study exists already; give another folder$"):
        run_study(planned)
    assert (tmp_path / "study/scaling.json").read_text(encoding="utf-8") == "{}"


def test_room_is_counted_node_by_node() -> None:
    nodes = [{"CPU": 3.0}, {"CPU": 3.0, "GPU": 1.0}, {}]
    assert workers_that_fit(nodes, {"CPU": 2}) == 2
    assert workers_that_fit(nodes, {"CPU": 1}) == 6
    assert workers_that_fit(nodes, {"CPU": 0.1}) == 60
    assert workers_that_fit(nodes, {"CPU": 1, "GPU": 0.5}) == 2


# -- arithmetic --------------------------------------------------------------------------------------------------------


def summary(*ranks: tuple[float, float, float, float]) -> dict[str, Any]:
    names = ("samples", "seconds", "data", "communication")
    return {
        "path": "runs/timed",
        "step_times": {"steps": 10, "ranks": [dict(zip(names, rank, strict=True)) for rank in ranks]},
    }


def test_shares_are_means_over_the_ranks_and_sum_to_one(small_run: dict[str, Any]) -> None:
    size = measured(RunConfig.model_validate(small_run), summary((300, 2, 0.5, 0.1), (340, 2, 0.3, 0.7)))
    assert (size["workers"], size["batch_size"], size["steps"]) == (2, 64, 10)
    assert size["samples_per_s"] == pytest.approx(320)  # 640 samples in 2 seconds
    assert size["step_s"] == pytest.approx(0.2)
    assert size["shares"] == pytest.approx({"compute": 0.6, "communication": 0.2, "data": 0.2})
    assert sum(size["shares"].values()) == pytest.approx(1)


def test_a_run_that_ended_before_a_step_was_timed_has_no_numbers(small_run: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match="runs/timed ended before a step was timed; lower warmup"):
        measured(RunConfig.model_validate(small_run), summary((0, 0, 0, 0)))


def test_sizes_are_compared_with_the_smallest() -> None:
    sizes = compared([{"workers": workers, "samples_per_s": rate} for workers, rate in ((2, 100), (4, 180), (8, 240))])
    assert [size["speedup"] for size in sizes] == pytest.approx([1, 1.8, 2.4])
    assert [size["efficiency"] for size in sizes] == pytest.approx([1, 0.9, 0.6])


# -- table and picture -------------------------------------------------------------------------------------------------


@pytest.fixture
def results() -> dict[str, Any]:
    sizes = [
        {
            "workers": workers,
            "batch_size": 64 * workers,
            "samples_per_s": rate,
            "step_s": 64 * workers / rate,
            "shares": {"compute": 0.95 - communication, "communication": communication, "data": 0.05},
        }
        for workers, rate, communication in ((1, 1000.0, 0.0), (2, 1800.0, 0.1), (8, 4000.0, 0.45))
    ]
    facts = {"name": "mine", "mode": "weak", "device": "cpu", "precision": "bf16"}
    return facts | {"sizes": compared(sizes)}


def test_the_table_has_a_row_for_each_size(results: dict[str, Any]) -> None:
    text = StringIO()
    Console(width=80, file=text).print(results_table(results))
    rows = [line.split() for line in text.getvalue().splitlines()]
    assert [row for row in rows if row and row[0].isdigit()] == [
        ["1", "64", "1,000", "1.00", "100%", "64", "95.0%", "0.0%", "5.0%"],
        ["2", "128", "1,800", "1.80", "90%", "71.1", "85.0%", "10.0%", "5.0%"],
        ["8", "512", "4,000", "4.00", "50%", "128", "50.0%", "45.0%", "5.0%"],
    ]


def test_the_picture_shows_rates_and_shares(results: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    path = write_picture(results, RunFolder(str(tmp_path), "study"))
    assert path == f"{tmp_path}/study/scaling.png"
    picture = imread(path)[..., :3]
    assert picture.shape == (504, 1200, 3)
    blue, red = picture[..., 2] - picture[..., 0] > 0.3, picture[..., 0] - picture[..., 2] > 0.3
    assert blue[:, :600].sum() > 300  # the curve
    assert blue[:, 600:].sum() > 10 * red[:, 600:].sum() / 3 > 3000  # the bars: computing 2.3, communication 0.55


def test_a_mistake_in_the_file_is_told_with_its_line(small_run: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(small_run | {"epochs": 0}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"bad\.yaml:\d+: epochs: must be"):
        plan_study(path, [1])
