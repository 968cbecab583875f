"""Sharded training on several ranks without Ray: what one process comes to, with a share of its memory for each."""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from sharded_runs import (
    OWN,
    assert_close,
    flat,
    go_on_with_the_same_bits,
    in_project,
    offloaded,
    registered,
    run_of,
    saved,
    train,
    without_ray,
)

from raytorch.distributed import Worker
from raytorch.distributed.shards import own_part
from raytorch.training.flops import FlopCounter

GROUPS = {"groups": [{"match": "*bias", "lr": 0.05}, {"match": "head*", "weight_decay": 0.3}]}
ADAMW = {"optimizer": {"name": "adamw", "lr": 0.01}}
VIT = {"name": "vit", "dim": 16, "heads": 2, "layers": 2, "feedforward": 32, "patch": 4, "dropout": 0.0}
WEIGHTS = "runs/accumulated-1/export/model.safetensors"
LOOP: dict[str, Any] = {"loop": "own.py:main", **dict.fromkeys(["data", "model", "optimizer"])}
RUNS: dict[str, dict[str, Any]] = {
    "accumulated": {
        "accumulate": 3,
        "clip_norm": 0.1,
        "ema": {"decay": 0.9},
        "optimizer": {"name": "adamw", "lr": 0.01} | GROUPS,
        "metrics": ["own.py:right"],
        "on_evaluation": "own.py:keep_mean",
        "export": ["safetensors"],
    },
    "recomputed": {
        "model": OWN | {"checkpointing": ["blocks.*"], "freeze": ["blocks.0.*", "embed.bias"], "weights": WEIGHTS}
    },
    "kept": {"parallel": {"reshard_after_forward": False, "wrap": ["blocks.1", "blocks.2"]}, "compile": True},
    "vit": {"model": VIT},
    "conv": {"model": {"name": "convnet", "channels": [4, 8]}},
    "loop": LOOP,
    "longer": LOOP | {"steps": 6},
}
ON_RANKS = {
    2: [("accumulated", "fsdp"), ("recomputed", "fsdp"), ("kept", "fsdp"), ("vit", "fsdp"), ("loop", "fsdp")],
    4: [("accumulated", "hsdp"), ("conv", "fsdp"), ("vit", "hsdp")],
}


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The runs as a single process trains them, in the current folder."""
    before = Path.cwd()
    in_project(tmp_path_factory.mktemp("sharded"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("raytorch.training.parts.data_parallel", lambda module: module)
        patch.setattr("ray.get", lambda answer: answer)
        for name, keys in RUNS.items():
            plain = {key: value for key, value in keys.items() if key not in ("parallel", "compile")}
            train(run_of(f"{name}-1", 1, "ddp", **plain), Worker(0, 1, torch.device("cpu")))
        yield
    os.chdir(before)


def come_to_the_same(worker: Worker) -> None:
    without_ray()
    workers = worker.world_size
    for name, strategy in ON_RANKS[workers]:
        run = run_of(f"{name}-{workers}", workers, strategy, **RUNS[name])
        with offloaded() if name == "kept" else nullcontext():
            train(run, worker)
        assert_the_same(worker, run.name, f"{name}-1")
    if workers == 2:
        compute_as_autocast_does(worker)
    hold_a_share(worker)
    for strategy in ("fsdp", "hsdp", "ddp") if workers == 4 else ("ddp",):
        go_on_with_the_same_bits(worker, run_of("accumulated-2", workers, strategy, **RUNS["accumulated"]))
    if workers == 4:
        train(run_of("loop-2", 4, "hsdp", **RUNS["longer"]), worker)
        assert_the_same(worker, "loop-2", "longer-1")


def assert_the_same(worker: Worker, name: str, expected: str) -> None:
    """What two runs have saved last, as rank 0 finds it."""
    if worker.rank == 0:
        (model, state), (other, others) = saved(name), saved(expected)
        assert_close(model, other, 1e-5)
        for key in ("kept", "averages"):
            assert_close(flat(state[key]), flat(others[key]), 1e-5)


def compute_as_autocast_does(worker: Worker) -> None:
    """Weights that are gathered in bf16 are what autocast makes of them, for calls outside of it too."""
    for strategy in ("ddp", "fsdp"):
        train(run_of(f"bf16-{strategy}", 2, strategy, precision="bf16"), worker)
    if worker.rank == 0:
        assert_close(saved("bf16-fsdp")[0], saved("bf16-ddp")[0], 1e-6)

    trainer, progress = registered(run_of("bf16-calls", 2, "fsdp", precision="bf16"), worker)
    images = torch.ones(2, 1, 8, 8)
    alone = trainer.model(images)
    with progress.precision.autocast():
        within = trainer.model(images)
    assert (alone.dtype, within.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(alone, within.float())
    progress.close()


def hold_a_share(worker: Worker) -> None:
    """Of weights, gradients and what the optimizer remembers; none but rank 0 has ever had all weights, and each of
    three blocks is gathered by itself.
    """
    held: dict[str, int] = {}
    operations: set[int] = set()
    for strategy in ("ddp", "fsdp"):
        run = run_of(f"share-{strategy}", worker.world_size, strategy, model=OWN | {"width": 64}, **ADAMW)
        trainer, progress = registered(run, worker)
        with FlopCounter() as counter:
            trainer.train_step(next(iter(trainer.batches)))
        operations.add(counter.total)
        state = [value for each in trainer.steps.optimizer.state.values() for value in each.values()]
        parameters = list(trainer.model.parameters())
        tensors = [*parameters, *(each.grad for each in parameters if each.grad is not None), *state]
        held[strategy] = sum(own_part(tensor).nbytes for tensor in tensors)
        assert len(state) == 3 * len(parameters)
        assert sum(hasattr(module, "unshard") for module in trainer.model.modules()) == (4 if strategy == "fsdp" else 0)
        is_outlined = strategy == "fsdp" and worker.rank > 0
        assert trainer.model.built_on == ("meta" if is_outlined else "cpu")
        progress.close()
    assert len(operations) == 1
    assert held["fsdp"] <= {2: 0.52, 4: 0.27}[worker.world_size] * held["ddp"]


def test_shared_models_come_to_what_one_process_does_and_are_resumed_by_others() -> None:
    """Weights, averages and optimizers, in the form that a checkpoint has of one process; from 2 ranks to 4 and 1."""
    on_ranks(come_to_the_same, 2)
    alone = Worker(0, 1, torch.device("cpu"))
    go_on_with_the_same_bits(alone, run_of("accumulated-2", 1, "fsdp", **RUNS["accumulated"]))
    on_ranks(come_to_the_same, 4)
    lines = Path("seen-4.txt").read_text(encoding="utf-8").split()  # of on_evaluation, which is given a whole model
    seen = [float(line) for line in lines]
    assert seen == pytest.approx(3 * [seen[0]], rel=1e-4)
