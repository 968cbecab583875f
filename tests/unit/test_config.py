"""The schema of a run: its defaults, its documentation, and the combinations that it refuses."""

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from raytorch import config
from raytorch.config import ConflictError, RunConfig, Scaling, Section
from raytorch.config.json_schema import schema
from raytorch.errors import ConfigError

IMAGES = "mlp or convnet or resnet18 or rnn or vit"
DATA = "digits or mnist or cifar10 or arrays or images or shards or table"
TAKEN = ", which metrics.jsonl has for something else; rename it"


def sections(section: type[Section] = Section) -> Iterator[type[Section]]:
    """Those of a configuration."""
    for subclass in section.__subclasses__():
        if subclass.__module__.startswith("raytorch.config."):
            yield subclass
        yield from sections(subclass)


def conflict(values: dict[str, Any]) -> ConflictError:
    with pytest.raises(ValidationError) as caught:
        RunConfig.model_validate({"epochs": 1, **values})
    (error,) = caught.value.errors()
    found = error["ctx"]["error"]
    assert isinstance(found, ConflictError)
    return found


def test_the_length_of_a_run_is_all_that_has_to_be_given() -> None:
    run = RunConfig(epochs=1)
    assert (run.data.name, run.model.name, run.loss.name) == ("digits", "mlp", "cross_entropy")
    assert (run.optimizer.name, run.schedule.name) == ("adamw", "constant")
    assert RunConfig.model_validate({"steps": 10}).epochs is None


@pytest.mark.parametrize("section", list(sections()), ids=lambda section: section.__name__)
def test_every_section_and_field_is_described(section: type[Section]) -> None:
    assert section.__doc__
    assert [name for name, field in section.model_fields.items() if not field.description] == []


@pytest.mark.parametrize("key", ["data", "model", "optimizer", "schedule"])
def test_every_variant_is_valid_by_its_name_alone(key: str) -> None:
    partners = {"conv3d": {"data": "moving_mnist"}, "seq2seq": {"data": "mnist_strips"}, "gpt": {"data": "text"}}
    partners |= {"moving_mnist": {"model": "conv3d"}, "mnist_strips": {"model": "seq2seq"}}
    partners |= {name: {"model": "lm.py:Lm"} for name in ("text", "tokens")}
    (names, *_) = schema()["properties"][key]["anyOf"]
    for name in names["enum"]:
        run = RunConfig.model_validate({"epochs": 1, key: name, **partners.get(name, {})})
        assert getattr(run, key).name == name


def test_variants_show_their_name_first() -> None:
    named = [section for section in sections() if section is not RunConfig and "name" in section.model_fields]
    assert len(named) > 15
    assert [section for section in named if next(iter(section.model_fields)) != "name"] == []


def test_a_config_does_not_change() -> None:
    run = RunConfig(epochs=1)
    with pytest.raises(ConfigError, match="seed: a configuration stays as it is"):
        run.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "message", "first_key"),
    [
        ({"epochs": None}, "give epochs or steps", "epochs"),
        ({"steps": 1}, "give either epochs or steps, not both", "epochs"),
        (
            {"batch_size": 8, "accumulate": 4, "scaling": {"workers": {"min": 1, "max": 3}}},
            "batch_size (8) must be at least workers x accumulate (3 x 4 = 12), a sample for each",
            "batch_size",
        ),
        (
            {"epochs": None, "steps": 10, "schedule": {"name": "constant", "warmup_steps": 10}},
            "warmup_steps (10) must be below the steps of the run (10)",
            "schedule.warmup_steps",
        ),
        (
            {"epochs": 2, "batch_size": 1_000, "schedule": {"name": "cosine", "warmup_steps": 9}},
            "warmup_steps (9) must be below the steps of the run (4)",
            "schedule.warmup_steps",
        ),
        (
            {"data": {"name": "digits", "train_samples": 100}, "schedule": {"name": "one_cycle", "warmup_steps": 1}},
            "warmup_steps (1) must be below the steps of the run (1)",
            "schedule.warmup_steps",
        ),
        (
            {"model": "conv3d"},
            f"model conv3d reads clips, data digits has images; take data moving_mnist or arrays, or model {IMAGES}",
            "model.name",
        ),
        (
            {"model": "seq2seq"},
            f"model seq2seq reads strips, data digits has images; take data mnist_strips or arrays, or model {IMAGES}",
            "model.name",
        ),
        (
            {"model": "seq2seq", "data": "moving_mnist"},
            "model seq2seq reads strips, data moving_mnist has clips; take data mnist_strips or arrays, or model "
            "conv3d",
            "model.name",
        ),
        (
            {"data": "moving_mnist"},
            f"model mlp reads images or rows, data moving_mnist has clips; take data {DATA}, or model conv3d",
            "model.name",
        ),
        (
            {"data": "mnist_strips"},
            f"model mlp reads images or rows, data mnist_strips has strips; take data {DATA}, or model seq2seq",
            "model.name",
        ),
        (
            {"model": "seq2seq", "data": "mnist_strips", "loss": "mse"},
            "model seq2seq needs loss cross_entropy, not mse",
            "loss.name",
        ),
        (
            {"data": {"name": "mnist_strips", "min_digits": 5}},
            "min_digits (5) must not exceed max_digits (4)",
            "min_digits",
        ),
        ({"model": {"name": "vit", "dim": 30}}, "dim (30) must be a multiple of heads (4)", "dim"),
        (
            {"loss": {"name": "bce", "label_smoothing": 0.1}},
            "label_smoothing works with cross_entropy only, not with bce; remove it",
            "label_smoothing",
        ),
        (
            {"model": {"name": "rnn", "dropout": 0.1}},
            "dropout acts between layers; it needs layers of 2 or more",
            "dropout",
        ),
        (
            {"data": {"name": "mnist_strips", "augment": {"flip": True}}, "model": "seq2seq"},
            "a mirrored strip reads backwards; set augment.flip to false",
            "augment.flip",
        ),
        (
            {"optimizer": {"name": "sgd", "nesterov": True, "momentum": 0}},
            "nesterov needs a momentum above 0",
            "nesterov",
        ),
        (
            {"checkpoint": {"best_by": "acuracy"}},
            "no metric acuracy in this run; one of accuracy, loss (did you mean 'accuracy'?)",
            "checkpoint.best_by",
        ),
        (
            {"stop": {"metric": "f2", "patience": 1}, "metrics": ["mine.py:f1"]},
            "no metric f2 in this run; one of f1, loss",
            "stop.metric",
        ),
        ({"metrics": ["f2"]}, "model mlp has no metric f2; one of accuracy, mae, or FILE.py:NAME", "metrics"),
        ({"metrics": ["a.py:f1", "b.py:f1"]}, "two metrics are called f1; leave one out, or rename it", "metrics"),
        ({"metrics": ["a.py:loss"]}, f"a metric cannot be called loss{TAKEN}", "name"),
        ({"metrics": ["a.py:step"]}, f"a metric cannot be called step{TAKEN}", "name"),
        ({"scaling": {"workers": {"min": 3, "max": 2}}}, "min (3) must not exceed max (2)", "min"),
        (
            {"scaling": {"backend": "nccl"}},
            "backend nccl needs gpus_per_worker: 1 (a GPU of its own for each worker); use gloo or auto",
            "backend",
        ),
    ],
)
def test_impossible_combinations(values: dict[str, Any], message: str, first_key: str) -> None:
    error = conflict(values)
    assert str(error) == message
    assert error.keys[0] == first_key


@pytest.mark.parametrize(
    ("scaling", "workers", "backend"),
    [
        ({}, (1, 1), "gloo"),
        ({"workers": 3, "gpus_per_worker": 1}, (3, 3), "nccl"),
        ({"workers": {"min": 1, "max": 4}, "gpus_per_worker": 0.5}, (1, 4), "gloo"),
        ({"backend": "gloo", "gpus_per_worker": 1}, (1, 1), "gloo"),
    ],
)
def test_what_scaling_stands_for(scaling: dict[str, Any], workers: tuple[int, int], backend: str) -> None:
    resolved = Scaling.model_validate(scaling)
    assert (resolved.min_workers, resolved.max_workers) == workers
    assert resolved.resolved_backend == backend


@pytest.mark.parametrize("name", ["a", "A-1_b.c", "1e-3", "x" * 128])
def test_names_that_a_folder_can_have(name: str) -> None:
    assert RunConfig(epochs=1, name=name).name == name


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "..", "a b", "a\n", "x" * 129, "é"])
def test_names_that_a_folder_should_not_have(name: str) -> None:
    with pytest.raises(ConfigError, match="name: must be 1 to 128 letters"):
        RunConfig(epochs=1, name=name)


def test_adamw_decays_weights_by_default_and_adam_does_not() -> None:
    assert (config.Adam().weight_decay, config.AdamW().weight_decay) == (0.0, 0.01)
