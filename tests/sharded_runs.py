"""Runs of several ranks that share a model, without Ray: what they train, and what each rank has of it."""

import os
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partialmethod
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from lone_runs import Monitor, follow
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raytorch.config import RunConfig
from raytorch.config.file import from_data
from raytorch.distributed import Worker
from raytorch.distributed.sharding import whole
from raytorch.distributed.shards import gathered
from raytorch.runs.checkpoint_manifest import latest_checkpoint
from raytorch.runs.plan import RunPlan, WorkerJob
from raytorch.runs.storage import LiveFiles, RunFolder
from raytorch.training import evaluation, model_shards, parts
from raytorch.training.loop import Trainer
from raytorch.training.progress import RunProgress
from raytorch.training.run import Run
from raytorch.training.saved_state import open_checkpoint
from raytorch.training.worker import prepare

CODE = '''
import torch
from torch import nn
from torch.nn.functional import cross_entropy


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    """Of sizes that no number of workers divides, with a buffer that is not saved."""

    def __init__(self, num_classes, width=15, depth=3):
        super().__init__()
        self.built_on = torch.empty(0).device.type
        self.embed, self.scale = nn.Linear(64, width), nn.Parameter(torch.ones(1))
        self.register_buffer("shift", torch.linspace(-1, 1, width), persistent=False)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, num_classes)

    def forward(self, images):
        x = self.embed(images.flatten(1)) * self.scale + self.shift
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    @torch.jit.export
    def classes(self, images):
        return self(images).argmax(1)


def right(model, batch):
    images, targets = batch
    return (model.classes(images) == targets).sum(), len(targets)


def keep_mean(model, step):
    images = torch.ones(1, 1, 8, 8)
    with open(f"seen-{step}.txt", "a", encoding="utf-8") as file:
        file.write(f"{model(images).mean().item()!r}\\n")


def main(run, *, depth: int = 2):
    """A loop that averages, clips, evaluates on shares that are not equal, and calls what is not compiled."""
    net = run.model("model", Net, num_classes=10, depth=depth)
    judge = run.average("model", 0.5)
    drawn = torch.rand(())  # by generators that have drawn the weights
    optimizer = run.optimizer("adamw", torch.optim.AdamW(net.parameters(), 0.01))
    data = run.data("digits", "train")
    for images, targets in run.batches(data):
        with run.autocast():
            loss = cross_entropy(net(images), targets) * drawn
        optimizer.zero_grad()
        run.backward(loss)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
        run.log(loss=loss)
        if run.ends_epoch:
            with run.evaluating():
                count = sum(len(judge(images)) for images, _ in run.share(run.data("digits", "test"), 74))
            run.evaluated(loss=(float(count), 297 / run.worker.world_size))
'''
OWN = {"name": "own.py:Net"}
BASE: dict[str, Any] = {
    "data": "digits",
    "model": OWN,
    "steps": 4,
    "batch_size": 60,
    "precision": "fp32",
    "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
    "logging": {"every_steps": 2, "tensorboard": False},
    "storage": "runs",
}


def run_of(name: str, workers: int, strategy: str, **keys: Any) -> RunConfig:
    """A small run; ``parallel`` and ``scaling`` are made of the arguments."""
    parallel = {"strategy": strategy, **keys.pop("parallel", {})}
    if strategy == "hsdp":
        parallel["shard"] = workers // 2
    merged = BASE | keys | {"name": name, "scaling": {"workers": workers}, "parallel": parallel}
    return from_data({key: value for key, value in merged.items() if value is not None})


def without_ray() -> None:
    """For a process of its own: no call asks for Ray, compiling only traces, and shares have several batches."""
    ray.get = lambda answer: answer
    evaluation.EVALUATION_BATCH = 74
    parts.data_parallel = _data_parallel  # type: ignore[attr-defined]
    nn.Module.compile = partialmethod(nn.Module.compile, backend="aot_eager")  # type: ignore[assignment]


def _data_parallel(module: nn.Module) -> nn.Module:
    return DistributedDataParallel(module, broadcast_buffers=False) if dist.is_initialized() else module


@contextmanager
def offloaded() -> Iterator[None]:
    """Keep shards in the CPU's memory, as if the worker had a GPU."""
    make = model_shards.Sharding
    model_shards.Sharding = lambda *given, **named: make(*given, **named | {"offload": True})  # type: ignore
    yield
    model_shards.Sharding = make  # type: ignore[misc]


def train(config: RunConfig, worker: Worker) -> None:
    """Follow a run as one of its ranks, to its end or from its newest checkpoint on."""
    if worker.rank == 0:
        RunFolder(config.storage, config.name).make()
    _meet(worker)
    follow(RunPlan(config), Monitor(), worker)
    _meet(worker)


def registered(config: RunConfig, worker: Worker) -> tuple[Trainer, RunProgress]:
    """The shipped loop of a run before its next step, with what its newest checkpoint has."""
    if worker.rank == 0:
        RunFolder("runs", config.name).make()
    _meet(worker)
    prepare(config, worker)
    with closing(LiveFiles(RunFolder("runs", config.name))) as files:
        progress = RunProgress(WorkerJob(RunPlan(config), Monitor()), worker, files)
        progress.begin()
        return Trainer(Run(progress)), progress


def saved(name: str, storage: str = "runs") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights and the state of a run's latest checkpoint."""
    folder = RunFolder(storage, name)
    with open_checkpoint(folder, str(latest_checkpoint(folder))) as content:
        return content.model(torch.device("cpu")), content.state()


def go_on_with_the_same_bits(worker: Worker, run: RunConfig) -> None:
    """What the run of that name has saved others have again, though each may have another part of it."""
    _, progress = registered(run, worker)
    models = {key: model for key, (model, _) in progress.parts.in_one_piece().items()}
    trained, state = whole(progress.parts.models["model"].bare), gathered(progress.parts.state())
    progress.close()
    if worker.rank == 0:
        model, expected = saved(run.name)
        assert_close(models["model"].state_dict(), model, 0)
        assert_close(trained.state_dict(), expected["averages"]["model"]["trained"], 0)
        assert_close(flat(state), flat({key: expected[key] for key in state}), 0)


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested state as leaves by their place."""
    if isinstance(value, Mapping):
        pairs = [(str(key), part) for key, part in value.items()]
    elif isinstance(value, (list, tuple)):
        pairs = [(str(number), part) for number, part in enumerate(value)]
    else:
        return {name: value}
    return {place: leaf for key, part in pairs for place, leaf in flat(part, f"{name}.{key}").items()}


def assert_close(found: Mapping[str, Any], expected: Mapping[str, Any], tolerance: float) -> None:
    """Tensors are alike up to ``tolerance``, all else is the same; to the bit with 0."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert found[name].shape == value.shape, name
            torch.testing.assert_close(
                found[name], value, rtol=tolerance, atol=tolerance, msg=lambda it, at=name: at + it
            )
        else:
            assert found[name] == value, name


def _meet(worker: Worker) -> None:
    if worker.world_size > 1:
        dist.barrier()


def in_project(folder: Path) -> None:
    """Make ``folder`` the current one, with the code of the runs."""
    os.chdir(folder)
    Path("own.py").write_text(CODE, encoding="utf-8")
