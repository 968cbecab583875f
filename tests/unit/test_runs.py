"""Planning, finding and listing runs."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from run_folders import add_checkpoint, finished, started

from raytorch.config import RunConfig
from raytorch.config.file import dump_config
from raytorch.config.resuming import RULES
from raytorch.errors import CheckpointError, ConfigError, Remedy, RunExistsError, RunNotFoundError, UserError
from raytorch.runs.catalog import find_run
from raytorch.runs.checkpoint_manifest import latest_checkpoint
from raytorch.runs.plan import RunPlan, plan_resume, plan_run
from raytorch.runs.storage import BASE, RunFolder


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig(name="digits", epochs=1, storage=str(tmp_path / "runs"))


# -- new runs ----------------------------------------------------------------------------------------------------------


def test_a_plan_has_a_name_and_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = RunConfig.model_validate({"data": {"name": "mnist", "root": "data"}, "epochs": 1})
    plan = plan_run(config, "mine")
    assert plan.config.model_dump() == config.model_dump() | {
        "name": "mine",
        "storage": f"{tmp_path}/runs",
        "data": config.data.model_dump() | {"root": f"{tmp_path}/data"},
    }
    assert str(plan.folder) == f"{tmp_path}/runs/mine"
    assert not (tmp_path / "runs").exists()  # planning writes nothing


def test_a_relative_folder_of_data_is_refused_in_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BASE, "s3://bucket/runs")
    with pytest.raises(UserError) as failure:
        plan_run(RunConfig.model_validate({"data": {"name": "mnist", "root": "data"}, "epochs": 1}), "mine")
    assert str(failure.value) == (
        "data.root: data would be in the job's own folder on the cluster, where data is not sent; give the folder in "
        "full, as all nodes reach it, e.g. data.root=/shared/data"
    )


@pytest.mark.parametrize("data", [{"name": "digits"}, {"name": "mnist", "root": "/shared/data"}])
def test_data_that_every_node_finds_is_taken_in_a_job(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: dict[str, Any]
) -> None:
    monkeypatch.setenv(BASE, str(tmp_path))
    config = RunConfig.model_validate({"data": data, "epochs": 1})
    planned = plan_run(config, "mine").config
    assert planned.data == config.data
    assert planned.storage == f"{tmp_path}/runs"


def test_a_run_without_a_name_takes_the_configurations_and_the_time(config: RunConfig) -> None:
    assert re.fullmatch(r"digits-\d{8}-\d{6}", plan_run(config).config.name)


def test_the_time_fits_behind_the_longest_name(config: RunConfig) -> None:
    name = plan_run(config.model_copy(update={"name": "x" * 128})).config.name
    assert len(name) == 128
    assert re.fullmatch(r"x+-\d{8}-\d{6}", name)


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "-x", "a b", "x" * 129, "é", "x\n"])
def test_a_name_that_is_no_folder_everywhere_is_refused(config: RunConfig, name: str) -> None:
    with pytest.raises(ConfigError) as failure:
        plan_run(config, name)
    assert str(failure.value) == (
        f"name {name!r}: must be 1 to 128 letters, digits, '.', '_' or '-', of which the first is a letter or digit"
    )


def test_a_name_that_is_taken_is_refused(config: RunConfig, tmp_path: Path) -> None:
    started(config)
    with pytest.raises(RunExistsError) as failure:
        plan_run(config, "mine")
    assert str(failure.value) == (f"{tmp_path}/runs/mine exists already; take another name, or resume it")


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_the_latest_complete_checkpoint_counts(config: RunConfig) -> None:
    folder = plan_run(config, "mine").folder
    assert latest_checkpoint(folder) is None
    add_checkpoint(folder, 9, {"model.safetensors": 3, "state.json": 3})
    complete = add_checkpoint(folder, 10, {"model.safetensors": 3, "state.json": 3})
    add_checkpoint(folder, 20, {"model.safetensors": 3, "state.json": 4})  # cut short
    (add_checkpoint(folder, 30, {"model.safetensors": 3, "state.json": 3}) / "state.json").unlink()
    (add_checkpoint(folder, 40, {"model.safetensors": 3}) / "checkpoint.json").unlink()
    (add_checkpoint(folder, 50, {"model.safetensors": 3}) / "checkpoint.json").write_text(
        '{"files": {', encoding="utf-8"
    )
    (add_checkpoint(folder, 60, {"model.safetensors": 3}) / "checkpoint.json").write_text("{}", encoding="utf-8")
    Path(folder.path, ".saving-70").mkdir()
    Path(folder.path, "checkpoint_00000080").write_text("a file", encoding="utf-8")
    assert latest_checkpoint(folder) == complete.name == "checkpoint_00000010"


# -- resuming ----------------------------------------------------------------------------------------------------------


def test_a_run_is_resumed_by_name_or_path_with_its_own_configuration(config: RunConfig, tmp_path: Path) -> None:
    started(config)
    expected = RunPlan(
        plan_run(config, "other").config.model_copy(update={"name": "mine"}), is_new=False, new_code_at=None
    )
    assert plan_resume("mine", storage=config.storage) == expected
    assert plan_resume(f"{tmp_path}/runs/mine") == expected
    assert plan_resume(f"{tmp_path}/runs/mine/") == expected


def test_a_changed_configuration_keeps_the_runs_name_and_place(config: RunConfig) -> None:
    folder = started(config)
    more = config.model_copy(update={"epochs": 9, "storage": "elsewhere", "name": "ignored"})
    plan = plan_resume(folder.path, more)
    assert (plan.config.epochs, str(plan.folder)) == (9, str(folder))


def test_a_run_that_has_come_to_its_end_has_nothing_left_to_do(config: RunConfig) -> None:
    folder = finished(config)
    same = plan_resume(folder.path).config
    for plan in (plan_resume(folder.path), plan_resume(folder.path, same)):
        assert plan.finished is not None
        assert (plan.finished["path"], plan.finished["metrics"]) == (folder.path, {"accuracy": 0.5})


@pytest.mark.parametrize("changes", [{"epochs": 9}, {"export": ["onnx"]}, {"scaling": {"workers": 2}}])
def test_a_run_that_is_given_more_has_something_to_do(config: RunConfig, changes: dict[str, Any]) -> None:
    folder = finished(config)
    assert plan_resume(folder.path, RunConfig.model_validate(config.model_dump() | changes)).finished is None


def test_a_run_that_ended_early_is_not_to_be_had_further_by_epochs(config: RunConfig) -> None:
    patient = RunConfig.model_validate(config.model_dump() | {"stop": {"patience": 3}})
    folder = finished(patient)
    summary = json.loads(folder.read_bytes("summary.json")) | {"ended_early": "no better accuracy in 3 evaluations"}
    folder.write_json("summary.json", summary)

    def resumed(**changes: Any) -> RunPlan:
        return plan_resume(folder.path, RunConfig.model_validate(patient.model_dump() | changes))

    with pytest.raises(
        ConfigError, match=r"ended early \(no better .*\) and would .*; to go on, give stop more patience"
    ):
        resumed(epochs=20)
    assert resumed(epochs=20, stop=None).finished is None
    assert resumed(stop={"patience": 4}).finished is None
    assert resumed(export=["safetensors"]).finished is None
    assert resumed().finished is not None


def test_a_run_without_its_last_checkpoint_has_something_to_do(config: RunConfig) -> None:
    assert plan_resume(finished(config, step=6).path).finished is None


def test_a_run_that_was_moved_goes_on_where_it_is(config: RunConfig, tmp_path: Path) -> None:
    folder = started(config)
    (tmp_path / "archive").mkdir()
    shutil.move(folder.path, tmp_path / "archive" / "renamed")
    plan = plan_resume(f"{tmp_path}/archive/renamed")
    assert str(plan.folder) == f"{tmp_path}/archive/renamed"
    assert plan.config.name == "renamed"


REFUSED = {
    "seed": {"seed": 1},
    "data.name": {"data": "mnist"},
    "data.train_samples": {"data": {"name": "digits", "train_samples": 100}},
    "data.augment.flip": {"data": {"name": "digits", "augment": {"flip": True}}},
    "model.name": {"model": "rnn"},
    "model.hidden": {"model": {"name": "mlp", "hidden": [8]}},
    "optimizer.name": {"optimizer": "adam"},
    "batch_size": {"batch_size": 8},
}


@pytest.mark.parametrize("key", REFUSED)
@pytest.mark.parametrize("edited", [True, False])
def test_a_change_that_is_refused_is_named_and_leaves_the_run_as_it_was(
    config: RunConfig, key: str, edited: bool
) -> None:
    folder = started(config)
    before = folder.read_bytes("config.yaml").decode()
    other = RunConfig.model_validate(config.model_dump() | REFUSED[key])
    if edited:  # in the run's folder
        folder.write_text("config.yaml", dump_config(other))
    with pytest.raises(ConfigError) as failure:
        plan_resume(folder.path, None if edited else other)
    told = str(failure.value)
    assert told.startswith(f"{key} is ")
    assert f" in the run that is resumed ({folder.path}/checkpoint_00000005/checkpoint.json) and cannot become " in told
    assert "\n" not in told
    assert folder.read_bytes("config.yaml").decode() == (dump_config(other) if edited else before)
    folder.write_text("config.yaml", before)
    assert plan_resume(folder.path).config.seed == config.seed


def test_all_changes_that_are_refused_are_named(config: RunConfig) -> None:
    folder = started(config)
    with pytest.raises(ConfigError) as failure:
        plan_resume(folder.path, RunConfig.model_validate(config.model_dump() | {"model": "rnn", "seed": 1}))
    assert [line.partition(" is ")[0] for line in str(failure.value).splitlines()] == ["seed", "model.name"]


def test_a_change_that_is_refused_before_the_first_checkpoint_is_so_by_the_runs_configuration(
    config: RunConfig,
) -> None:
    folder = started(config)
    folder.delete("checkpoint_00000005")
    with pytest.raises(ConfigError, match=f"^seed is 0 in the run that is resumed \\({folder.path}/config.yaml\\)"):
        plan_resume(folder.path, config.model_copy(update={"seed": 1}))


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": {"name": "adamw", "lr": 0.5, "betas": [0.5, 0.6], "amsgrad": True, "weight_decay": 0.5}},
        {"schedule": {"name": "cosine", "warmup_steps": 2}},
        {"loss": {"label_smoothing": 0.1}},
        {"precision": "bf16", "compile": True, "accumulate": 2, "clip_norm": 1.0, "epochs": 9},
        {"epochs": None, "steps": 5},
        {"scaling": {"workers": {"min": 1, "max": 2}}, "checkpoint": {"keep": 5}, "failure": {"max_restarts": 0}},
        {"logging": {"every_steps": 3}, "export": ["onnx"]},
    ],
)
def test_every_other_change_is_taken(config: RunConfig, changes: dict[str, Any]) -> None:
    folder = started(config)
    other = RunConfig.model_validate(config.model_dump() | changes)
    plan = plan_resume(folder.path, other)
    assert plan.config == other.model_copy(update={"name": "mine"})


def test_data_may_have_moved(tmp_path: Path) -> None:
    config = RunConfig.model_validate({"epochs": 1, "data": "mnist", "storage": str(tmp_path / "runs")})
    folder = started(config)
    moved = config.model_dump() | {"data": {"name": "mnist", "root": str(tmp_path), "download": True}}
    assert plan_resume(folder.path, RunConfig.model_validate(moved)).config.data.root == str(tmp_path)  # type: ignore[union-attr]


@pytest.mark.parametrize(("changes", "told"), [({"steps": 4}, "steps is 4"), ({"epochs": 1}, "epochs is 1")])
def test_a_run_that_has_gone_further_is_not_cut_back(config: RunConfig, changes: dict[str, int], told: str) -> None:
    folder = started(config, epoch=1.25)
    other = RunConfig.model_validate(config.model_dump() | {"epochs": None} | changes)
    with pytest.raises(ConfigError, match=f"^{told}, but the run that is resumed has done "):
        plan_resume(folder.path, other)


def test_every_key_has_a_rule_and_every_rule_a_key() -> None:
    schema = RunConfig.model_json_schema()
    top = set(schema["properties"])
    assert top <= RULES.keys()
    assert {key.partition(".")[0] for key in RULES} == top
    below = {name for section in schema["$defs"].values() for name in section.get("properties", {})}
    assert {key.split(".")[-1] for key in RULES if "." in key} <= below


def test_a_run_of_an_older_format_is_refused_before_anything_is_written(config: RunConfig) -> None:
    folder = started(config)
    path = Path(folder.path, "checkpoint_00000005", "checkpoint.json")
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"format": 1}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"^{path.parent} has format 1, which cannot be resumed; .*load_model"):
        plan_resume(folder.path)


def test_a_run_that_is_not_there_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(RunNotFoundError) as failure:
        plan_resume("nothing", storage=str(tmp_path))
    assert str(failure.value) == f"no run nothing in {tmp_path}; give a run that is there"
    assert failure.value.remedies == (Remedy("list_runs", str(tmp_path)),)
    with pytest.raises(RunNotFoundError, match=f"^no run nothing in {tmp_path}/sub; "):
        find_run(f"{tmp_path}/sub/nothing", "runs")


def test_a_run_that_is_nearly_there_is_named(config: RunConfig) -> None:
    folder = started(config, "digits-20260102-030405")
    with pytest.raises(RunNotFoundError, match=r"\(did you mean 'digits-20260102-030405'\?\); give a run"):
        find_run("digits-20260102-03045", folder.storage)
    study = RunFolder(folder.storage, "digits-scale")
    study.make()
    study.write_text("scaling.json", "{}")
    with pytest.raises(RunNotFoundError, match=r"^no run digits-scale in .*; give a run that is there") as failure:
        find_run("digits-scale", folder.storage)
    assert "'digits-scale'" not in str(failure.value)


def test_a_run_without_a_checkpoint_is_resumed_from_its_beginning(config: RunConfig) -> None:
    folder = started(config)
    folder.delete("checkpoint_00000005")
    assert plan_resume(folder.path).folder.path == folder.path


def test_a_new_run_does_not_take_over_what_an_old_one_left(config: RunConfig) -> None:
    folder = started(config)
    folder.delete("config.yaml")
    with pytest.raises(RunExistsError):
        plan_run(config, "mine")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"epochs: [", "/config.yaml:1:10: not valid YAML: while parsing"),
        (b"epochs: 1\nseed: x", "/config.yaml:2: seed: must be a whole number of at least 0 and below 4294967296, not"),
        (b"epochs: 1\nname: caf\xe9", "/config.yaml:2: not UTF-8; save the file as UTF-8"),
        (b"", "/config.yaml: the file is empty; it is damaged"),
        (b"[]", "/config.yaml:1: must be a mapping"),
    ],
)
def test_a_configuration_that_was_damaged_is_named(config: RunConfig, text: bytes, message: str) -> None:
    folder = started(config)
    folder.write_bytes("config.yaml", text)
    with pytest.raises(ConfigError) as failure:
        plan_resume(folder.path)
    assert str(failure.value).startswith(folder.path + message)
    assert str(failure.value).endswith("\ncorrect the file to resume the run")


def test_a_configuration_that_was_corrected_is_read_as_a_users_file_is(config: RunConfig) -> None:
    folder = started(config)
    folder.write_text(
        "config.yaml", dump_config(config).replace("lr: 0.001", "lr: 1e-2").replace("digits", "2021-99-99", 1)
    )
    assert plan_resume(folder.path).config.optimizer.lr == 0.01
