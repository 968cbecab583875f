"""Reading a run's file: what it may say, overrides, what is written, and the schema."""

import subprocess
import sys
import threading
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import jsonschema
import pytest
import yaml
from config_texts import read

from raytorch.config import RunConfig
from raytorch.config.file import dump_config, load_config
from raytorch.config.json_schema import schema
from raytorch.optimizers import OPTIMIZERS

ROOT = Path(__file__).parents[2]
SHIPPED = [
    path
    for path in sorted((ROOT / "configs").rglob("*.yaml"))
    if not {"sweeps", "cluster"} & set(path.relative_to(ROOT / "configs").parts)
]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# -- what a file may say -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_configs(path: Path) -> None:
    assert isinstance(load_config(path), RunConfig)


def test_a_name_alone_stands_for_its_section() -> None:
    assert read("epochs: 1\noptimizer: adam\nloss: mse") == read(
        "epochs: 1\noptimizer: {name: adam}\nloss: {name: mse}"
    )


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "+1e-3", "1.0e-3", "1.e-3", "0.001", ".001", "00.001"])
def test_numbers_as_people_write_them(text: str) -> None:
    assert read(f"epochs: 1\noptimizer: {{name: sgd, lr: {text}}}").optimizer.lr == 0.001


@pytest.mark.parametrize(("text", "number"), [("010", 10), ("0o10", 8), ("0x1F", 31), ("+7", 7), ("08", 8)])
def test_whole_numbers_are_those_of_yaml_1_2(text: str, number: int) -> None:
    assert read(f"epochs: {text}").epochs == number
    assert read("epochs: 1", f"epochs={text}").epochs == number


@pytest.mark.parametrize("text", ["on", "Yes", "no", "1_000", "1:30", "0b1", "0o9", "2026-11-22", "=", "-0x1", "y"])
def test_what_only_yaml_1_1_takes_for_something_else_is_text_and_is_written_in_quotes(text: str) -> None:
    run = read(f"epochs: 1\nstorage: {text}")
    assert run.storage == text
    assert read(dump_config(run)) == run
    assert yaml.safe_load(dump_config(run))["storage"] == text


def test_dates_are_text() -> None:
    assert read("epochs: 1\nname: 2026-11-22").name == "2026-11-22"


def test_anchors_and_merge_keys() -> None:
    run = read("epochs: &n 3\nseed: *n\nscaling: &s {workers: 2}\nlogging: {every_steps: *n}\n")
    assert (run.seed, run.logging.every_steps) == (3, 3)
    run = read("epochs: 1\noptimizer:\n  <<: {name: sgd, lr: 0.5}\n  lr: 0.25\n")
    assert (run.optimizer.name, run.optimizer.lr) == ("sgd", 0.25)


def test_byte_order_mark_and_windows_line_ends() -> None:
    Path("run.yaml").write_bytes(b"\xef\xbb\xbfepochs: 1\r\nseed: 2\r\n")
    assert load_config("run.yaml").seed == 2


# -- overrides ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "overrides", "same_as"),
    [
        ("epochs: 1", ["seed=3"], "{epochs: 1, seed: 3}"),
        ("epochs: 1", ["seed=3", "seed=4"], "{epochs: 1, seed: 4}"),
        ("epochs: 1", ["epochs=", "steps=5"], "steps: 5"),
        ("epochs: 1\noptimizer: adam", ["optimizer.lr=1e-2"], "{epochs: 1, optimizer: {name: adam, lr: 0.01}}"),
        ("epochs: 1", ["optimizer.lr=0.1"], "{epochs: 1, optimizer: {name: adamw, lr: 0.1}}"),
        ("epochs: 1\nscaling:", ["scaling.workers=2"], "{epochs: 1, scaling: {workers: 2}}"),
        (
            "epochs: 1\nscaling: {workers: 9}",
            ["scaling.workers.min=1", "scaling.workers.max=2"],
            "{epochs: 1, scaling: {workers: {min: 1, max: 2}}}",
        ),
        (
            "epochs: 1\noptimizer: {name: adam, lr: 0.5}",
            ["optimizer.name=sgd"],
            "{epochs: 1, optimizer: {name: sgd, lr: 0.5}}",
        ),
        ("epochs: 1\nmodel: {name: mlp, hidden: [8]}", ["model=vit"], "{epochs: 1, model: {name: vit}}"),
        (
            "epochs: 1",
            ["model={name: mlp, hidden: [8, 9]}", "model.hidden=[7]"],
            "{epochs: 1, model: {name: mlp, hidden: [7]}}",
        ),
        ("epochs: 1", ["storage=s3://bucket/runs?a=b"], '{epochs: 1, storage: "s3://bucket/runs?a=b"}'),
    ],
)
def test_overrides(text: str, overrides: list[str], same_as: str) -> None:
    assert read(text, *overrides) == read(same_as)


def test_an_override_leaves_what_shares_an_anchor_alone() -> None:
    run = read("epochs: 1\ncheckpoint: &c {every_steps: 5}\nlogging: *c\n", "checkpoint.every_steps=6")
    assert (run.checkpoint.every_steps, run.logging.every_steps) == (6, 5)


# -- what is written ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"epochs": 1},
        {"steps": 7, "name": "1e-3", "storage": "on", "clip_norm": 1e-30},
        {"epochs": 1, "name": "2026-11-22", "storage": "é: 'x' \n # \0", "optimizer": {"name": "sgd", "lr": 1e22}},
        {"epochs": 1, "scaling": {"workers": {"min": 1, "max": 3}}, "checkpoint": {"every_epochs": None}},
    ],
)
def test_what_dump_writes_load_reads(values: dict[str, Any]) -> None:
    run = RunConfig.model_validate(values)
    assert read(dump_config(run)) == run


def test_dump_writes_everything_in_the_order_of_the_schema() -> None:
    text = dump_config(RunConfig(epochs=2))
    assert list(yaml.safe_load(text)) == [key for key in RunConfig.model_fields if key != "loop"]
    keys = "  weights: null\n  strict: true\n  freeze: []\n  checkpointing: []\n"
    assert f"model:\n  name: mlp\n{keys}  hidden: [128]\n  dropout: 0.0\n" in text
    assert "optimizer:\n  name: adamw\n  lr: 0.001\n  betas: [0.9, 0.999]\n  eps: 1.0e-08\n" in text
    assert "!" not in text


# -- the schema --------------------------------------------------------------------------------------------------------


def test_the_schema_is_one_that_editors_understand() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    assert schema()["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema()["title"] == "raytorch run"
    assert schema()["properties"]["optimizer"]["anyOf"][0] == {"enum": [*OPTIMIZERS]}


@pytest.mark.parametrize(
    ("run", "valid"),
    [
        ({"epochs": 1}, True),
        ({"epochs": 1, "model": "vit", "loss": "mse", "data": "mnist", "optimizer": "sgd", "schedule": "step"}, True),
        ({"model": {"name": "vit", "dim": 8}, "scaling": {"workers": {"min": 1, "max": 2}}}, True),
        ({"optimizer": {"name": "adam", "betas": [0.9, 0.99]}, "scaling": {"workers": 2}}, True),
        (
            {"metrics": ["accuracy", {"name": "mine.py:error", "better": "lower"}], "checkpoint": {"best_by": None}},
            True,
        ),
        ({"metrics": [{"better": "lower"}]}, False),
        ({"model": "vitt"}, False),
        ({"model": {"dim": 8}}, False),
        ({"model": {"name": "mlp", "dim": 8}}, False),
        ({"epoch": 1}, False),
        ({"scaling": {"workers": 0}}, False),
    ],
)
def test_the_schema_accepts_what_a_file_may_say(run: dict[str, Any], valid: bool) -> None:
    assert jsonschema.Draft202012Validator(schema()).is_valid(run) is valid


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_schema_accepts_shipped_configs(path: Path) -> None:
    load_config(path)
    jsonschema.validate(yaml.safe_load(path.read_text(encoding="utf-8")), schema(), cls=jsonschema.Draft202012Validator)


def test_reading_a_config_imports_nothing_heavy() -> None:
    code = "import sys, raytorch.config.file; print(sorted({'torch', 'ray', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_what_a_shell_writes_into_a_pipe_is_waited_for() -> None:
    with Popen(["/bin/sh", "-c", "read -r line; echo epochs: 3"], stdin=PIPE, stdout=PIPE) as writing:
        assert writing.stdin
        assert writing.stdout
        threading.Timer(0.2, writing.stdin.close).start()
        assert load_config(f"/dev/fd/{writing.stdout.fileno()}").epochs == 3
