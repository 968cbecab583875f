"""What of a model is gathered by itself, and what goes with sharding."""

from typing import Any

import pytest
import torch
from torch import nn

from raytorch.config import RunConfig
from raytorch.config.file import from_data
from raytorch.distributed import Worker
from raytorch.distributed.sharding import Sharding, shard
from raytorch.errors import ConfigError, UserError
from raytorch.models.networks import Architecture
from raytorch.training import model_shards
from raytorch.training.model_shards import gathered_apart, groups_of
from raytorch.training.preparing import prepare

FSDP = {"strategy": "fsdp"}


def run_with(**keys: Any) -> RunConfig:
    return from_data({"epochs": 1, "batch_size": 64, "scaling": {"workers": 4}, "parallel": FSDP} | keys)


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ({"name": "mlp", "hidden": [16, 16]}, ["1", "4", "7"]),
        ({"name": "convnet", "channels": [4, 8]}, ["0", "3"]),
        ({"name": "vit", "layers": 3, "checkpointing": ["encoder.*"]}, ["encoder.0", "encoder.1", "encoder.2"]),
        ({"name": "resnet18"}, [f"layer{layer}.{block}" for layer in range(1, 5) for block in range(2)]),
    ],
)
def test_repeated_modules_of_a_list_are_gathered_one_by_one(model: dict[str, Any], names: list[str]) -> None:
    """The outermost of them, whatever has been done to their classes; normalizations beside them are too small."""
    run = run_with(model=model)
    with torch.device("meta"):
        built = Architecture(run.model, (1, 16, 16), 10, None).build()
    assert gathered_apart(prepare(built, run.model), run, "model") == names


class Sharing(nn.Module):
    """Blocks of which two have a parameter in common, beside a list of one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(4))
        self.blocks[2][0].weight = self.blocks[1][0].weight  # type: ignore[index, union-attr]
        self.heads = nn.ModuleList([nn.Linear(2, 2)])


def test_modules_that_share_a_parameter_with_others_are_not() -> None:
    assert gathered_apart(Sharing(), run_with(), "model") == ["blocks.0", "blocks.3"]


def test_modules_are_gathered_by_patterns_of_their_names() -> None:
    """Of those inside each other the outermost: a list of modules is not called."""
    run = run_with(parallel=FSDP | {"wrap": ["blocks*", "heads.0"]})
    assert gathered_apart(Sharing(), run, "model") == ["blocks.0", "blocks.3", "heads.0"]


def test_a_pattern_of_no_module_is_refused_but_in_a_loop_with_several_models() -> None:
    misspelt = FSDP | {"wrap": ["blokcs.*"]}
    with pytest.raises(ConfigError, match=r"^parallel.wrap: no module has a name like 'blokcs\.\*' \(did you mean 'bl"):
        gathered_apart(Sharing(), run_with(parallel=misspelt), "model")
    loop = RunConfig.model_construct(**dict(run_with(parallel=misspelt)) | {"loop": "main"})
    assert gathered_apart(Sharing(), loop, "model") == ["blocks.0", "blocks.3"]


def test_a_model_without_repeated_modules_is_refused() -> None:
    model = nn.ModuleDict({"cell": nn.LSTM(2, 2), "head": nn.Linear(2, 2)})
    with pytest.raises(ConfigError) as refused:
        gathered_apart(model, run_with(), "model")
    assert str(refused.value) == (
        "parallel.wrap: nothing in model says into what it is divided, as it has no list of several modules of the "
        "same class; name its large modules, as parallel.wrap: ['cell'] (there are cell, head), or take strategy: ddp"
    )


def test_a_parameter_without_a_dimension_is_refused() -> None:
    model = nn.Linear(2, 2)
    model.scale = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(
        UserError, match=r"^parallel.strategy: parameter scale is a number without a dimension, which c"
    ):
        shard(model, [], Sharding(((0, 1),), torch.device("cpu")))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"optimizer": "muon"},
            "muon computes with whole matrices, of which a worker has a share only; take adamw, or",
        ),
        ({"optimizer": "adafactor"}, "adafactor computes with whole matrices"),
        ({"parallel": FSDP | {"shard": 2}}, "shard is for strategy hsdp; leave it out"),
        ({"parallel": {"strategy": "hsdp", "shard": 3}}, r"shard \(3\) must divide the number of workers, which must"),
        (
            {"parallel": {"strategy": "hsdp", "shard": 2}, "scaling": {"workers": {"min": 2, "max": 4}}},
            r"shard \(2\) must divide the number of workers, which must not change",
        ),
        ({"scaling": {"workers": 2, "gpus_per_worker": 0.5}}, "strategy fsdp needs NCCL on GPUs: gpus_per_worker: 1"),
    ],
)
def test_what_does_not_go_with_sharding_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_with(**keys)


@pytest.mark.parametrize(
    ("nodes", "groups"),
    [
        ("aaaa", ((0, 1, 2, 3),)),
        ("aabb", ((0, 1), (2, 3))),
        ("abab", ((0, 2), (1, 3))),
        ("aaab", ((0, 1, 2, 3),)),  # each node would need as many
    ],
)
def test_hsdp_shards_within_nodes(nodes: str, groups: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_shards, "gather_objects", lambda own: list(nodes))
    assert groups_of(run_with(parallel={"strategy": "hsdp"}), Worker(0, 4, torch.device("cpu"))) == groups
