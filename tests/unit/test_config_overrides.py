"""Reading a run's file: the message for each thing that an override may not say."""

from pathlib import Path

import pytest
from config_texts import problems

from raytorch.config import ModelKeys, RunConfig

TOP = ", ".join(RunConfig.model_fields)
KEYS = ", ".join(["name", *ModelKeys.model_fields])
NAME = "1 to 128 letters, digits, '.', '_' or '-', of which the first is a letter or digit"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("seed", "must be KEY=VALUE, such as optimizer.lr=0.01"),
        ("=3", "must be KEY=VALUE, such as optimizer.lr=0.01"),
        ("optimizer..lr=3", "must be KEY=VALUE, such as optimizer.lr=0.01"),
        ("sed=3", f"sed: unknown key; allowed: {TOP} (did you mean 'seed'?)"),
        ("seed=-1", "seed: must be a whole number of at least 0 and below 4294967296, not -1"),
        ("seed.x=1", "seed: must be a whole number of at least 0 and below 4294967296, not a mapping"),
        ("seed=[1", "not valid YAML: while parsing a flow sequence, expected ',' or ']', but got '<stream end>'"),
        ("scaling={workers: 1, workers: 2}", "scaling.workers: duplicate key, first given on line 1"),
        ("scaling.workers.min=2", "scaling.workers.max: missing; must be a whole number of at least 1"),
        (
            "model.name=vitt",
            "model.name: must be one of mlp, convnet, resnet18, rnn, vit, conv3d, seq2seq, gpt or FILE.py:NAME "
            "of your own, not 'vitt' "
            "(did you mean 'vit'?)",
        ),
        (
            "model.name=rnn",
            f"model.heads: unknown key; allowed: {KEYS}, cell, hidden, layers, bidirectional, dropout",
        ),
        ("model.heads=3", "model.heads: dim (64) must be a multiple of heads (3)"),
        ("steps=3", "steps: give either epochs or steps, not both"),
        (
            "schedule.warmup_steps=100",
            "schedule.warmup_steps: warmup_steps (100) must be below the steps of the run (12)",
        ),
        (
            "scaling.workers=256",
            "scaling.workers: batch_size (128) must be at least workers x accumulate (256 x 1 = 256), "
            "a sample for each",
        ),
        (
            "data=mnist_strips",
            "data: model vit reads images, data mnist_strips has strips; take data digits or mnist or cifar10 or "
            "arrays or images or shards, or model seq2seq",
        ),
        ("model.patch=5", "model.patch: patch (5) must divide the image's height and width (8 x 8)"),
    ],
)
def test_a_problem_that_an_override_causes_names_it(override: str, problem: str) -> None:
    text = "epochs: 1\nmodel: {name: vit, heads: 4}\nscaling: {workers: 2}\n"
    assert problems(text, override) == [f"override {override}: {problem}"]


def test_problems_of_the_file_come_first_in_its_order() -> None:
    assert problems("seed: -1\nname: a b\nepochs: 0", "batch_size=0") == [
        "run.yaml:1: seed: must be a whole number of at least 0 and below 4294967296, not -1",
        f"run.yaml:2: name: must be {NAME}, not 'a b'",
        "run.yaml:3: epochs: must be a whole number of at least 1 or null, not 0",
        "override batch_size=0: batch_size: must be a whole number of at least 1, not 0",
    ]
