"""Runs of code of a user's own, that are resumed and exported: what of their records is taken, and what is not run."""

import json
from pathlib import Path

import pytest
from run_folders import started

from raytorch.cli.common import config_from_options
from raytorch.config.file import dump_config, from_data
from raytorch.errors import ConfigError, UserError
from raytorch.models.networks import Architecture
from raytorch.runs.plan import placed, plan_resume
from raytorch.runs.storage import RunFolder
from raytorch.serialization.whole_models import save_model
from raytorch.sweeps.file import load_sweep
from raytorch.sweeps.sweep import plan_resumed_sweep, plan_sweep
from raytorch.training.export import load_run

NET = """
from torch import nn

def net(num_classes: int, *, widths: tuple[int, ...] = (4, 3)):
    return nn.Linear(4, num_classes)
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_finished_run_whose_code_takes_a_tuple_has_nothing_left_to_do() -> None:
    """Of which its records have a list."""
    Path("net.py").write_text(NET, encoding="utf-8")
    config = from_data({"epochs": 1, "model": "net.py:net"})
    assert config.code
    folder = started(config, code=config.code.digests())
    folder.write_json("summary.json", {"state": "finished", "started": "2026-01-02T03:04:05+00:00", "step": 5})
    assert plan_resume(folder.path).finished is not None


def test_a_run_is_not_resumed_with_a_copy_of_its_code_that_lacks_the_secrets() -> None:
    Path("net.py").write_text(f"{NET}STORE = 's3://key:secret@bucket/x'\n", encoding="utf-8")
    config = from_data({"epochs": 1, "model": "net.py:net"})
    assert config.code
    folder = started(config, code=config.code.digests())
    Path("net.py").write_text(config.code.copies()["net.py"], encoding="utf-8")
    told = r"net.py has changed; bring it back, .*; in net.py \*\*\* stands for secrets: put them back, and take"
    with pytest.raises(ConfigError, match=told):
        plan_resume(folder.path)


def test_a_change_of_what_is_recorded_leaves_its_code_to_be_found_from_the_root(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever folder of the project a run is resumed in."""
    Path(".git").mkdir()
    Path("sub").mkdir()
    for file, default in (("net.py", 1), ("sub/net.py", 2)):
        Path(file).write_text(f"def net(num_classes: int, *, width: int = {default}): ...\n", encoding="utf-8")
    config = from_data({"epochs": 1, "model": "net.py:net"})
    folder = started(config)
    monkeypatch.chdir("sub")
    changed = config_from_options(None, ["epochs=2"], None, None, folder.path)
    assert (changed.epochs, changed.model, changed.code) == (2, config.model, config.code)


def test_a_sweep_does_not_go_on_with_changed_code() -> None:
    """Whose trials could not be compared with those that are done."""
    Path("net.py").write_text(NET, encoding="utf-8")
    run = "run: {epochs: 1, model: net.py:net}\nparameters: {model.widths: {grid: [[1], [2]]}}\n"
    Path("sweep.yaml").write_text(run, encoding="utf-8")
    plan = plan_sweep(load_sweep("sweep.yaml"), "sweep")
    plan.folder.make()
    plan.folder.write_text("sweep.yaml", dump_config(plan.sweep.config))
    trial = placed(plan.sweep.trials[1].config, "trial-001", plan.folder.address)
    assert trial.code
    started(trial, "trial-001", code=trial.code.digests())
    assert plan_resumed_sweep("sweep").sweep.trials[1].config.code == trial.code
    Path("net.py").write_text(NET + "# changed\n", encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"sweep/trial-001 was other than it is: net.py has changed; bring it back, a"
    ):
        plan_resumed_sweep("sweep")


@pytest.fixture
def theirs() -> RunFolder:
    """A run of somebody else's, which brings code along: its records name that, and have its digests."""
    Path("runs/theirs").mkdir(parents=True)
    Path("runs/theirs/net.py").write_text(f"open('trace', 'w').close()\n{NET}", encoding="utf-8")
    config = from_data({"epochs": 1, "model": "runs/theirs/net.py:net"})
    assert config.code
    folder = started(from_data({"epochs": 1}), "theirs", code=config.code.digests())
    folder.write_text("config.yaml", dump_config(config))
    return folder


REFUSED = r"runs/theirs names code in its own folder, runs/theirs/net.py, of which nothing is run; read it, and move"


def test_code_in_a_runs_own_folder_is_not_resumed(theirs: RunFolder) -> None:
    with pytest.raises(UserError, match=REFUSED):
        plan_resume(theirs.path)


def test_code_in_a_runs_own_folder_is_not_exported(theirs: RunFolder) -> None:
    there = Path(theirs.path, "checkpoint_00000005")
    config = from_data({"epochs": 1, "model": "runs/theirs/net.py:net"})
    weights = there / "model.safetensors"
    mlp = Architecture(from_data({"epochs": 1}).model, (1, 2, 2), 5).build()
    save_model(mlp, weights, Architecture(config.model, (1, 2, 2), 5, config.code))
    manifest = json.loads((there / "checkpoint.json").read_text(encoding="utf-8"))
    manifest["files"] = {weights.name: weights.stat().st_size}
    (there / "checkpoint.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(UserError, match=REFUSED):
        load_run(theirs, Path())
    assert not Path("trace").exists()
