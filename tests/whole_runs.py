"""Helpers for tests that run whole trainings."""

from pathlib import Path
from typing import Any

from torch import Tensor

from raytorch.config import RunConfig
from raytorch.runs.checkpoint_manifest import latest_checkpoint
from raytorch.runs.plan import RunPlan, plan_run
from raytorch.runs.storage import RunFolder
from raytorch.serialization import load_tensors

SMALL_RUN: dict[str, Any] = {
    "name": "small",
    "seed": 7,
    "data": {"name": "digits", "augment": {"crop": 1}},
    "model": {"name": "mlp", "hidden": [32], "dropout": 0.2},
    "optimizer": {"name": "adamw", "lr": 0.01},
    "schedule": {"name": "cosine", "warmup_steps": 5},
    "precision": "fp32",
    "epochs": 3,
    "batch_size": 64,
    "scaling": {"workers": 2},
    "logging": {"every_steps": 2, "tensorboard": False},
}
"""A run on the digits that takes a second: 1,500 samples in batches of 64, two workers, float32, with dropout."""


def plan(run: dict[str, Any], name: str, **changes: Any) -> RunPlan:
    """A plan for ``run`` with some sections replaced."""
    return plan_run(RunConfig.model_validate(run | changes), name)


def weights(folder: RunFolder) -> dict[str, Tensor]:
    """The model in a run's latest checkpoint."""
    return load_tensors(Path(folder.path) / str(latest_checkpoint(folder)) / "model.safetensors")


def assert_bitwise_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name in left if left[name].numpy().tobytes() != right[name].numpy().tobytes()]
    assert not different
