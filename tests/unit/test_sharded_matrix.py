"""Twenty steps of each model with each feature, divided in each way: what one process comes to.

RAYTORCH_TEST_DIVIDED is ``all`` for all of them, some minutes; without it there is one, of a decoder.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from sharded_runs import OWN, assert_close, in_project, run_of, saved, train, without_ray

from raytorch.distributed import Worker

MODELS: dict[str, dict[str, Any]] = {
    "gpt": {"name": "gpt", "dim": 16, "heads": 4, "kv_heads": 2, "layers": 2, "feedforward": 12},
    "vit": {"name": "vit", "dim": 16, "heads": 2, "layers": 2, "feedforward": 32, "patch": 4, "dropout": 0.0},
    "conv": {"name": "convnet", "channels": [4, 8]},
    "own": OWN,
}
WRAPPED = {"gpt": "blocks.*", "vit": "encoder.*", "own": "blocks.*"}
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"accumulate": 3},
    "clipped": {"clip_norm": 0.1},
    "averaged": {"ema": {"decay": 0.9}},
    "recomputed": {},
    "compiled": {"compile": True},
}
WAYS = {
    2: {"ddp": {"strategy": "ddp"}, "fsdp": {"strategy": "fsdp"}, "hsdp": {"strategy": "hsdp"}},
    4: {"fsdp": {"strategy": "fsdp"}, "hsdp": {"strategy": "hsdp"}, "tensor": {"strategy": "fsdp", "tensor": 2}},
}
IS_WHOLE = os.environ.get("RAYTORCH_TEST_DIVIDED") == "all"
CHOSEN = (
    [(model, feature) for model in MODELS for feature in FEATURES if feature != "recomputed" or model in WRAPPED]
    if IS_WHOLE
    else [("gpt", "accumulated")]
)


def keys_of(model: str, feature: str) -> dict[str, Any]:
    changes = {"checkpointing": [WRAPPED[model]]} if feature == "recomputed" else {}
    # With that seed no activation lies at the edge of its ReLU, where the order of a sum would decide on a gradient.
    keys = {"model": MODELS[model] | changes, "steps": 20, "seed": 1}
    if model == "gpt":
        keys["optimizer"] = {"name": "adamw", "lr": 0.003}
        keys["data"] = {
            "name": "text",
            "root": str(Path.cwd()),
            "train": "text.txt",
            "tokenizer": "bytes",
            "context": 16,
        }
    return keys | FEATURES[feature]


def divide(worker: Worker) -> None:
    without_ray()
    for model, feature in CHOSEN:
        for way, parallel in WAYS[worker.world_size].items():
            if way == "tensor" and model != "gpt":
                continue
            name = f"{model}-{feature}-{way}-{worker.world_size}"
            train(
                run_of(name, worker.world_size, parallel["strategy"], **keys_of(model, feature), parallel=parallel),
                worker,
            )
            if worker.rank == 0:
                off = compare(name, f"{model}-{feature}-1")
                with Path("told.txt").open("a", encoding="utf-8") as file:
                    file.write(f"{name:<28} weights off by {off:.1e} of the largest at most\n")


def compare(name: str, expected: str) -> float:
    (found, _), (other, _) = saved(name), saved(expected)
    assert_close(found, other, 1e-4)
    return max(float((found[key] - other[key]).abs().max() / other[key].abs().max().clamp(min=1e-3)) for key in other)


def test_however_a_model_is_divided_twenty_steps_come_to_what_one_process_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    in_project(tmp_path)
    Path("text.txt").write_text("All that is gold does not glitter, not all those who wander are lost. " * 60, "utf-8")
    monkeypatch.setattr("raytorch.training.parts.data_parallel", lambda module: module)
    monkeypatch.setattr("ray.get", lambda answer: answer)
    for model, feature in CHOSEN:
        plain = {key: value for key, value in keys_of(model, feature).items() if key != "compile"}
        train(run_of(f"{model}-{feature}-1", 1, "ddp", **plain), Worker(0, 1, torch.device("cpu")))
    for workers in WAYS:
        on_ranks(divide, workers)
    with capsys.disabled():
        if IS_WHOLE:
            print(f"\n{Path('told.txt').read_text('utf-8')}")
