"""A scaling study from the command line: two sizes, timed, and what it leaves."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import raytorch
from matplotlib.image import imread

pytestmark = pytest.mark.usefixtures("local_ray")


def test_a_study_measures_each_size_and_leaves_its_numbers_and_a_picture(small_config: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    done = raytorch(
        tmp_path,
        "scale",
        small_config,
        "--workers",
        "2,1",
        "--set",
        "batch_size=128",
        "--steps",
        30,
        "--warmup",
        5,
        "--out",
        out,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "small, weak scaling  ·  cpu, fp32" in done.stdout
    assert done.stdout.endswith(f"results   {out}/scaling.json\npicture   {out}/scaling.png\n")

    results = json.loads((out / "scaling.json").read_text(encoding="utf-8"))
    assert [(size["workers"], size["batch_size"], size["steps"]) for size in results["sizes"]] == [
        (1, 64, 30),
        (2, 128, 30),
    ]
    for size in results["sizes"]:
        shares = size["shares"]
        assert shares.keys() == {"compute", "communication", "data"}
        assert sum(shares.values()) == pytest.approx(1)
        assert min(shares.values()) >= 0
        assert f"{size['samples_per_s']:,.0f}" in done.stdout
        assert len(size["ranks"]) == size["workers"]
        # An epoch, 24 or 12 steps, ends within the timed ones, with a smaller batch.
        assert sum(rank["samples"] for rank in size["ranks"]) < 30 * size["batch_size"]
        summary = json.loads((Path(size["path"]) / "summary.json").read_text(encoding="utf-8"))
        assert (summary["state"], summary["step"], summary["workers"]) == ("finished", 35, size["workers"])
        assert not list(Path(size["path"]).glob("checkpoint_*"))
    alone, pair = results["sizes"]
    assert pair["shares"]["communication"] > alone["shares"]["communication"]
    assert (alone["speedup"], alone["efficiency"]) == (1, 1)
    assert pair["efficiency"] == pytest.approx(pair["speedup"] / 2)
    assert imread(out / "scaling.png").shape == (504, 1200, 4)


def test_a_size_that_the_machine_cannot_give_is_refused_before_any_run_starts(
    small_run: dict[str, Any], tmp_path: Path
) -> None:
    config = tmp_path / "wide.yaml"
    config.write_text(yaml.safe_dump(small_run | {"batch_size": 4096, "epochs": 10}), encoding="utf-8")
    done = raytorch(tmp_path, "scale", config, "--workers", "1,1000", "--mode", "strong")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("1000 workers with 1 CPU each need 1000 CPUs, but this machine has ")
    assert done.stderr.endswith("; lower workers or scaling.cpus_per_worker\n")
    assert not list((tmp_path / "runs").glob("*/*"))


def test_a_list_of_sizes_that_is_none_is_refused(small_config: Path, tmp_path: Path) -> None:
    done = raytorch(tmp_path, "scale", small_config, "--workers", "1,two")
    assert (done.returncode, done.stderr) == (2, "--workers 1,two: must be numbers of at least 1, such as 1,2,4,8\n")
