"""Runs on a GPU: NCCL, bf16, fp16, and the same numbers as on a CPU."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lone_runs import Monitor, follow, without_ray
from saved_states import load_saved_state, save_state
from torch import nn
from whole_runs import assert_bitwise_equal, plan, weights

from raytorch.config.file import from_data
from raytorch.datasets import TrainLoader
from raytorch.datasets.own import OwnDataset
from raytorch.distributed import Worker
from raytorch.optimizers import OPTIMIZERS, build_optimizer, optimizer_state, restore_optimizer
from raytorch.runs.plan import RunPlan, plan_resume
from raytorch.runs.storage import RunFolder
from raytorch.scaling.timed_training import train_timed
from raytorch.training.driver import run_training
from raytorch.training.loop import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

ONE_GPU = {"workers": 1, "gpus_per_worker": 1}


@pytest.fixture(scope="module", autouse=True)
def ray_with_a_gpu() -> Iterator[None]:
    from own_ray import own_ray

    with own_ray(num_cpus=2, num_gpus=1):
        yield


def test_a_worker_with_a_gpu_trains_on_it_over_nccl_in_bf16(small_run: dict[str, Any]) -> None:
    summary = run_training(plan(small_run, "gpu", scaling=ONE_GPU, precision="auto", epochs=20))
    assert summary["device"] == torch.cuda.get_device_name(0)
    assert (summary["backend"], summary["precision"]) == ("nccl", "bf16")
    assert summary["metrics"]["accuracy"] > 0.9


def test_the_same_seed_repeats_a_run_on_a_gpu(small_run: dict[str, Any]) -> None:
    first, second = (plan(small_run, name, scaling=ONE_GPU, deterministic=True) for name in ("first", "second"))
    run_training(first)
    run_training(second)
    assert_bitwise_equal(weights(first.folder), weights(second.folder))


@pytest.mark.parametrize("augment", [{}, {"crop": 1}])
def test_steps_behind_the_first_wait_for_no_gpu(
    augment: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch raises an error for what would wait for it."""
    train_step, device = Trainer.train_step, torch.device("cuda")

    def watched(trainer: Trainer, micro_batches: Any) -> None:
        torch.cuda.set_sync_debug_mode("error" if trainer.run.step > 1 else "default")
        try:
            train_step(trainer, micro_batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "train_step", watched)
    keys = {"name": "run", "steps": 8, "clip_norm": 1.0, "ema": {}, "scaling": ONE_GPU, "export": []}
    config = from_data(keys | {"data": {"name": "digits", "augment": augment}, "model": "convnet", "storage": "runs"})
    with without_ray(tmp_path, monkeypatch):
        RunFolder("runs", "run").make()
        assert follow(RunPlan(config), Monitor(), Worker(0, 1, device))["step"] == 8


def test_two_workers_share_a_gpu_over_gloo(small_run: dict[str, Any]) -> None:
    summary = run_training(plan(small_run, "shared", scaling={"workers": 2, "gpus_per_worker": 0.5}))
    assert (summary["backend"], summary["workers"], summary["state"]) == ("gloo", 2, "finished")


def test_steps_are_timed_in_the_gpus_own_time(small_run: dict[str, Any]) -> None:
    work = partial(train_timed, warmup=5, steps=20)
    times = run_training(plan(small_run, "timed", scaling=ONE_GPU), work=work)["step_times"]
    (rank,) = times["ranks"]
    assert (times["steps"], rank["samples"]) == (20, 20 * 64 - 36)  # an epoch ends with a batch of 28
    assert 0 < rank["data"] + rank["communication"] < rank["seconds"]


FP16: dict[str, Any] = {
    "scaling": ONE_GPU,
    "precision": "fp16",
    "clip_norm": 1.0,
    "optimizer": {"name": "muon", "lr": 0.02, "others": {"match": ["4.*"], "lr": 0.01}},
    "schedule": {"name": "plateau", "patience": 1, "warmup_steps": 5},
    "checkpoint": {"keep": 9},
}


def test_a_worker_with_a_gpu_trains_in_fp16_with_a_scaled_loss(small_run: dict[str, Any]) -> None:
    summary = run_training(plan(small_run, "half", **FP16, epochs=10))
    assert (summary["precision"], summary["state"]) == ("fp16", "finished")
    assert summary["metrics"]["accuracy"] > 0.9


def test_a_run_in_fp16_that_is_resumed_on_a_gpu_ends_with_the_same_bits(small_run: dict[str, Any]) -> None:
    whole, parted = (plan(small_run, name, **FP16) for name in ("whole", "parted"))
    run_training(whole)
    run_training(parted)
    for name in ("checkpoint_00000048", "checkpoint_00000072"):
        parted.folder.delete(name)
    run_training(plan_resume(parted.folder.path))
    assert_bitwise_equal(weights(whole.folder), weights(parted.folder))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_from_a_checkpoint_with_the_same_bits_on_a_gpu(name: str, tmp_path: Path) -> None:
    config = from_data({"steps": 8, "optimizer": name}).optimizer

    def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            torch.autograd.backward(model(torch.full((2, 8), step / 8, device="cuda")).square().sum())
            optimizer.step()

    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).cuda()

    whole, first, second = net(), net(), net()
    trained(whole, build_optimizer(config, whole.named_parameters()), range(8))
    optimizer = build_optimizer(config, first.named_parameters())
    trained(first, optimizer, range(4))
    save_state({"optimizer": optimizer_state(optimizer, first.parameters())}, tmp_path)
    second.load_state_dict(first.state_dict())
    optimizer = build_optimizer(config, second.named_parameters())
    restore_optimizer(optimizer, load_saved_state(tmp_path)["optimizer"], second.parameters())
    trained(second, optimizer, range(4, 8))
    for own, expected in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(own, expected)


class Pairs:
    """Samples with a tensor, a number and a text each."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pair": torch.arange(index, index + 2).float(), "index": index, "text": str(index)}


@pytest.mark.parametrize("readers", [0, 2])
def test_batches_of_own_data_come_to_the_gpu_from_pinned_memory(readers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[tuple[bool, bool]] = []
    to = torch.Tensor.to

    def told(batch: torch.Tensor, *where: Any, **how: Any) -> torch.Tensor:
        moved.append((batch.is_pinned(), how.get("non_blocking", False)))
        return to(batch, *where, **how)

    monkeypatch.setattr(torch.Tensor, "to", told)
    loader = TrainLoader(OwnDataset(Pairs(), torch.device("cuda"), readers=readers), batch_size=4)
    batches = [part.content for step in loader.remaining() for part in step]
    assert moved == [(True, True)] * 4
    index = torch.cat([batch["index"] for batch in batches])
    assert torch.equal(torch.cat([batch["pair"] for batch in batches])[:, 0], index.float())
    assert [text for batch in batches for text in batch["text"]] == [str(each) for each in index.tolist()]
    assert index.device.type == "cuda"
