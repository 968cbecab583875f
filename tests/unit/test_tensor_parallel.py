"""Products that groups of workers compute together: what one process comes to, alone and with sharding beside it."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from sharded_runs import (
    assert_close,
    flat,
    go_on_with_the_same_bits,
    in_project,
    registered,
    run_of,
    saved,
    train,
    without_ray,
)
from torch import nn

from raytorch.config import RunConfig
from raytorch.config.file import from_data
from raytorch.distributed import Worker
from raytorch.distributed.shards import own_part
from raytorch.distributed.tensor_parallel import check_plan
from raytorch.errors import ConfigError, UserError
from raytorch.runs.checkpoint_manifest import latest_checkpoint
from raytorch.runs.storage import RunFolder
from raytorch.training.model_shards import groups_of, products_of
from raytorch.training.saved_state import open_checkpoint

CODE = '''
import torch
from torch import nn
from torch.nn.functional import cross_entropy


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.gain = nn.Linear(width, 24), nn.Parameter(torch.ones(1))
        self.down = nn.Linear(24, width, bias=False)

    def forward(self, x):
        return self.down(torch.relu(self.up(x) * self.gain)).mul_(0.9)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(width), Mlp(width)

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Net(nn.Module):
    """With biases, a parameter of its own, and outputs of a number that no group divides."""

    tensor_plan = {"blocks.*.mlp": "region", "*.up": "column", "*.down": "row", "wide": "column", "narrow": "row",
                   "head": "gathered"}

    def __init__(self, num_classes, width=15):
        super().__init__()
        self.embed, self.scale = nn.Linear(64, width), nn.Parameter(torch.ones(1))
        self.wide, self.narrow = nn.Linear(width, 8), nn.Linear(8, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, num_classes)

    def forward(self, images):
        x = self.embed(images.flatten(1)) * self.scale
        x = x + self.narrow(torch.relu(self.wide(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Seen:
    """A metric that keeps a state: how many samples there were."""

    update_count = 0

    def __init__(self):
        self.reset()

    def reset(self):
        self.seen, self.update_count = [], 0

    def update(self, outputs, targets):
        self.seen.append(len(targets))
        self.update_count += 1

    def add_state(self, *given):
        """That it has one is told by this."""

    @property
    def metric_state(self):
        return {"seen": self.seen}

    def compute(self):
        return sum(self.seen)


def main(run):
    net = run.model("model", Net, num_classes=10)
    judge = run.average("model", 0.5)
    optimizer = run.optimizer("sgd", torch.optim.SGD(net.parameters(), 0.1, momentum=0.9))
    for images, targets in run.batches(run.data("digits", "train")):
        loss = cross_entropy(net(images), targets)
        optimizer.zero_grad()
        run.backward(loss)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
        run.log(loss=loss)
        if run.ends_epoch:
            with run.evaluating():
                count = sum(len(judge(images)) for images, _ in run.share(run.data("digits", "test"), 74))
            run.evaluated(loss=(float(count), 297 / run.worker.data_workers))
'''
GPT: dict[str, Any] = {"name": "gpt", "dim": 16, "heads": 4, "kv_heads": 2, "layers": 2, "feedforward": 12}
SGD = {"optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9}}
RUNS: dict[str, dict[str, Any]] = {
    "twenty": {"model": GPT, "steps": 20, "clip_norm": 0.5, **SGD},
    "accumulated": {"model": GPT, "accumulate": 3, "clip_norm": 0.1, "ema": {"decay": 0.9}},
    "recomputed": {"model": GPT | {"checkpointing": ["blocks.*"], "tied": False, "activation": "relu2"}, **SGD},
    "compiled": {"model": GPT | {"kv_heads": 4, "layers": 1}, "compile": True, **SGD},
    "own": {"model": "mine.py:Net", "data": "digits", "metrics": ["mine.py:Seen"], **SGD},
    "dropped": {"model": GPT | {"dropout": 0.3}, "steps": 1, **SGD},
    "unsaid": {"model": "unsaid.py:Net", "data": "digits"},
    "loop": {"loop": "mine.py:main", **dict.fromkeys(["data", "model", "optimizer"])},
}
ON_RANKS = [
    ("twenty", "fsdp", 2),
    ("accumulated", "fsdp", 2),
    ("accumulated", "ddp", 2),
    ("recomputed", "hsdp", 2),
    ("compiled", "fsdp", 2),
    ("own", "fsdp", 2),
    ("own", "ddp", 4),
    ("loop", "fsdp", 2),
]
"""Each with how many of four workers compute products together."""
RESUMED = [("fsdp", 1), ("hsdp", 2), ("ddp", 2)]


def run_with(name: str, workers: int, strategy: str, tensor: int, **keys: Any) -> RunConfig:
    root = str(Path.cwd())
    data = {"name": "text", "root": root, "train": "text.txt", "context": 16, "tokens_folder": f"{root}/tokens"}
    adamw = {"name": "adamw", "lr": 0.003}
    parallel = {"tensor": tensor, "wrap": ["blocks.*"]}
    given = {"data": data, "batch_size": 24, "optimizer": adamw, "parallel": parallel} | RUNS[name] | keys
    return run_of(f"{name}-{strategy}-{tensor}", workers, strategy, **given)


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The runs as a single process trains them, in the current folder."""
    before = Path.cwd()
    in_project(tmp_path_factory.mktemp("tensor"))
    Path("mine.py").write_text(CODE, encoding="utf-8")
    text = "".join(f"{number} times {number} is {number**2}. " for number in range(500))
    Path("unsaid.py").write_text(CODE.replace('"blocks.*.mlp": "region", ', ""), encoding="utf-8")
    Path("text.txt").write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("raytorch.training.parts.data_parallel", lambda module: module)
        patch.setattr("ray.get", lambda answer: answer)
        for name in {each for each, _, _ in ON_RANKS}:
            train(run_with(name, 1, "ddp", 1, compile=False), Worker(0, 1, torch.device("cpu")))
        yield
    os.chdir(before)


def come_to_the_same(worker: Worker) -> None:
    without_ray()
    for name, strategy, tensor in ON_RANKS:
        run = run_with(name, 4, strategy, tensor)
        train(run, worker)
        if worker.rank == 0:
            (model, state), (other, others) = saved(run.name), saved(f"{name}-ddp-1")
            assert_close(model, other, 1e-5)
            for key in ("kept", "averages"):
                assert_close(flat(state[key]), flat(others[key]), 1e-5)
            assert measured(run.name) == pytest.approx(measured(f"{name}-ddp-1"), rel=1e-5)
    parts_of_a_parameter_are_missed(worker)
    draw_alike(worker)
    hold_a_share(worker)
    for strategy, tensor in RESUMED:
        go_on_with_the_same_bits(worker, named("accumulated-fsdp-2", 4, strategy, tensor))
    go_on_with_the_same_bits(worker, named("accumulated-ddp-1", 4, "fsdp", 2))


def named(name: str, workers: int, strategy: str, tensor: int) -> RunConfig:
    """The run that accumulates, with the name of one that others have saved."""
    return run_with("accumulated", workers, strategy, tensor).model_copy(update={"name": name})


def measured(name: str) -> dict[str, float]:
    folder = RunFolder("runs", name)
    with open_checkpoint(folder, str(latest_checkpoint(folder))) as content:
        return content.manifest.metrics


def parts_of_a_parameter_are_missed(worker: Worker) -> None:
    """Of a plan that leaves out that something computes with parts, before weights part that should be the same."""
    with pytest.raises(
        ConfigError, match=r"^parallel.tensor: workers that compute together have other gradients of bl"
    ):
        train(run_with("unsaid", 4, "fsdp", 2), worker)


def draw_alike(worker: Worker) -> None:
    """Those of a group: else their gradients were others, which is refused; each group draws otherwise."""
    train(run_with("dropped", 4, "fsdp", 2), worker)
    if worker.rank == 0:
        first, second = saved("dropped-fsdp-2")[1]["generators"]["cpu"]
        assert not torch.equal(first, second)


def hold_a_share(worker: Worker) -> None:
    """Of all that is large, embeddings too, each of four has a fourth."""
    held: dict[int, int] = {}
    for tensor in (1, 2):
        model = GPT | {"dim": 64, "feedforward": 128}
        run = run_with("twenty", 4, "fsdp" if tensor > 1 else "ddp", tensor, model=model)
        trainer, progress = registered(run.model_copy(update={"name": f"share-{tensor}"}), worker)
        trainer.train_step(next(iter(trainer.batches)))
        state = [each["momentum_buffer"] for each in trainer.steps.optimizer.state.values()]
        parameters = list(trainer.model.parameters())
        assert len(state) == len(parameters)
        gradients = [each.grad for each in parameters if each.grad is not None]
        held[tensor] = sum(own_part(each).nbytes for each in (*parameters, *gradients, *state))
        progress.close()
    assert held[2] <= 0.26 * held[1]


def test_groups_of_workers_come_to_what_one_process_does_and_are_resumed_by_others() -> None:
    """In the form that a checkpoint has of one process, which goes on from it, too."""
    on_ranks(come_to_the_same, 4)
    go_on_with_the_same_bits(Worker(0, 1, torch.device("cpu")), named("accumulated-fsdp-2", 1, "fsdp", 1))


# -- what is refused ---------------------------------------------------------------------------------------------------


def refused(**keys: Any) -> str:
    data = {"name": "text", "context": 16}
    base = {"steps": 1, "batch_size": 8, "data": data, "model": "gpt", "scaling": {"workers": 4}}
    with pytest.raises(ConfigError) as caught:
        from_data(base | {"parallel": {"tensor": 2}} | keys)
    return str(caught.value)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (
            {"scaling": {"workers": 3}},
            "parallel.tensor: tensor (2) must divide the number of workers, which must not c",
        ),
        (
            {"scaling": {"workers": {"min": 2, "max": 4}}},
            "parallel.tensor: tensor (2) must divide the number of workers",
        ),
        ({"scaling": {"workers": 1}}, "parallel.tensor: tensor (2) must divide the number of workers"),
        (
            {"model": {"name": "gpt", "kv_heads": 1}},
            "tensor (2) must divide the heads of keys and values (1), of which",
        ),
        (
            {"model": {"name": "gpt", "feedforward": 33}},
            "tensor (2) must divide feedforward (33), of which each worker",
        ),
        (
            {"model": "vit", "data": "digits"},
            "tensor is for model gpt, and for models of your own that have a tensor_p",
        ),
        (
            {"optimizer": "muon"},
            "muon computes with whole matrices, of which a worker has a share only; take adamw, or le",
        ),
        (
            {"scaling": {"workers": 2, "gpus_per_worker": 0.5}},
            "tensor needs NCCL on GPUs: gpus_per_worker: 1, and back",
        ),
        (
            {"parallel": {"tensor": 4, "strategy": "hsdp", "shard": 2}},
            "shard (2) must be a multiple of tensor (4), as groups of so many workers compute products together",
        ),
        ({"batch_size": 1}, "batch_size (1) must be at least workers x accumulate (2 x 1 = 2), a sample for each"),
    ],
)
def test_what_does_not_go_with_it_is_refused(keys: dict[str, Any], told: str) -> None:
    assert told in refused(**keys)


class Planned(nn.Module):
    def __init__(self, **plan: str) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)
        self.embed, self.norm = nn.Embedding(4, 4, padding_idx=0), nn.LayerNorm(4)
        self.tensor_plan = plan


@pytest.mark.parametrize(
    ("workers", "plan", "told"),
    [
        (
            4,
            {"up": "column"},
            "parallel.tensor: 4 workers do not divide the out_features of up, 6; take another number",
        ),
        (4, {"down": "row"}, "parallel.tensor: 4 workers do not divide the in_features of down, 6"),
        (2, {"up": "colum"}, "tensor_plan: up: 'colum' is none of column, row, gathered, region"),
        (
            2,
            {"norm": "column"},
            "tensor_plan: norm is a LayerNorm; column is for an nn.Linear of which each worker comp",
        ),
        (2, {"embed": "row"}, "tensor_plan: embed has padding_idx, and cannot be divided so; leave it out"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(workers: int, plan: dict[str, str], told: str) -> None:
    with pytest.raises(UserError) as caught:
        check_plan(Planned(), plan, workers)
    assert str(caught.value).startswith(told)


def test_a_model_without_a_plan_or_with_one_of_no_module_is_refused() -> None:
    run = run_with("own", 4, "fsdp", 2)
    with pytest.raises(
        ConfigError, match=r"^parallel.tensor: nothing in model says which products workers compute toge"
    ):
        products_of(nn.Linear(2, 2), run, "model")
    with pytest.raises(
        ConfigError, match=r"^parallel.tensor: tensor_plan of model: no module has a name like 'u' \(did"
    ):
        products_of(Planned(u="column"), run, "model")
    assert products_of(Planned(u="column"), run_with("own", 4, "fsdp", 1), "model") == {}


@pytest.mark.parametrize(
    ("strategy", "nodes", "groups"),
    [
        ("ddp", "aaaa", ((0, 1), (2, 3))),
        ("fsdp", "aabb", ((0, 1, 2, 3),)),
        ("hsdp", "aabb", ((0, 1), (2, 3))),
        ("hsdp", "abab", ((0, 1, 2, 3),)),  # those that compute products together stay so
    ],
)
def test_who_computes_together_is_in_one_group(
    strategy: str, nodes: str, groups: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raytorch.training.model_shards.gather_objects", lambda own: list(nodes))
    run = run_of("groups", 4, "fsdp", model="mine.py:Net", parallel={"tensor": 2})
    parallel = run.parallel.model_copy(update={"strategy": strategy})
    assert groups_of(run.model_copy(update={"parallel": parallel}), Worker(0, 4, torch.device("cpu"))) == groups
