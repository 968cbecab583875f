"""Activation checkpointing by pattern: the same numbers to the last bit, for fewer bytes until the backward pass."""

import os
from copy import deepcopy
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pydantic import TypeAdapter
from ranks import free_port, start_ranks
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import spectral_norm

from raytorch.config import MlpModel, Model, RunConfig
from raytorch.errors import ConfigError
from raytorch.models.networks import Architecture
from raytorch.training.preparing import prepare


class Counted(nn.Linear):
    """A linear layer that counts how often it is computed."""

    computed = 0

    def forward(self, hidden: Tensor) -> Tensor:
        self.computed += 1
        return super().forward(hidden)


class Block(nn.Module):
    """Whatever a second call would change: dropout, running statistics, a buffer that is replaced, one that is used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = Counted(16, 64), nn.BatchNorm1d(64)
        self.last = spectral_norm(nn.Linear(64, 16))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, hidden: Tensor, *, scale: float = 1.0) -> Tensor:
        self.calls = self.calls + 1
        inner = nn.functional.dropout(self.norm(self.first(hidden)).relu(), 0.5, self.training)
        result: Tensor = hidden + self.last(inner * self.calls) * scale
        return result


class Net(nn.Module):
    """Three blocks, of which none is called on inputs that need gradients at first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(16, 4)

    def forward(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            hidden = block(hidden, scale=0.5)
        scores: Tensor = self.head(hidden)
        return scores


def net(*patterns: str) -> Net:
    model = Net()
    prepare(model, MlpModel(checkpointing=list(patterns)))
    return model


def trained(model: nn.Module, bare: nn.Module, *, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """All that a model comes to in three steps of two micro-batches, gradients and random generator included."""
    optimizer = torch.optim.SGD(bare.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(1)
    inputs = torch.randn(3, 2, 8, 16)
    for step in inputs:
        optimizer.zero_grad()
        for part in step:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = model(part).float().square().mean()
            loss.backward()
        optimizer.step()
    gradients = {f"{name}.grad": parameter.grad for name, parameter in bare.named_parameters()}
    return {**bare.state_dict(), **gradients, "generator": torch.get_rng_state()}  # type: ignore[dict-item]


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert list(left) == list(right)
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("patterns", [["blocks.*"], ["blocks.1", "*.norm"], ["*"]])
def test_every_bit_is_as_without_it(patterns: list[str], dtype: torch.dtype) -> None:
    plain, checkpointed = net(), net(*patterns)
    assert_same(trained(checkpointed, checkpointed, dtype=dtype), trained(plain, plain, dtype=dtype))


@pytest.mark.parametrize("name", ["resnet18", "rnn", "vit", "conv3d", "seq2seq"])
def test_shipped_models_are_recomputed(name: str) -> None:
    config = TypeAdapter(Model).validate_python({"name": name, **({"dropout": 0.5} if name == "vit" else {})})
    shape = {"conv3d": (1, 2, 8, 8), "seq2seq": (1, 8, 16)}.get(name, (1, 8, 8))
    gradients = []
    for patterns in ([], ["layer*" if name == "resnet18" else "*"]):
        torch.manual_seed(0)
        model = prepare(Architecture(config, shape, 10).build(), config.model_copy(update={"checkpointing": patterns}))
        inputs = [torch.randn(2, *shape), *([torch.tensor([[3, 10], [4, 10]])] if name == "seq2seq" else [])]
        model(*inputs).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()} | model.state_dict())
    assert_same(*gradients)  # type: ignore[arg-type]


def bytes_kept(model: nn.Module) -> int:
    """Bytes that are kept for the backward pass, but for parameters, each place in memory counted once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    held: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in own:
            kept[memory.data_ptr()] = memory.nbytes()
            held.append(tensor)  # whose place may not be taken by another
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.randn(32, 16))
    return sum(kept.values())


def test_less_is_kept_for_the_backward_pass() -> None:
    """Of a block, what it is given; the rest, about ten times as much, is computed again."""
    assert bytes_kept(net("blocks.*")) < bytes_kept(net()) / 5
    assert bytes_kept(net("blocks.*")) < bytes_kept(net("blocks.0")) < bytes_kept(net())


def calls(model: Net, *, backward: bool = True) -> list[int]:
    """How often the first linear layer of each block is computed in a step."""
    loss = model(torch.randn(8, 16)).sum()
    if backward:
        loss.backward()
    return [block.first.computed for block in model.blocks]  # type: ignore[union-attr, misc]


def test_the_outermost_of_the_modules_is_computed_again_once() -> None:
    assert calls(net()) == [1, 1, 1]
    assert calls(net("blocks.*", "blocks.1.first")) == [2, 2, 2]
    assert calls(net("blocks.0", "blocks.2")) == [2, 1, 2]
    with torch.no_grad():
        assert calls(net("blocks.*"), backward=False) == [1, 1, 1]


def test_names_and_copies_stay_as_they_were() -> None:
    model = net("blocks.*")
    assert list(model.state_dict()) == list(Net().state_dict())
    copy = deepcopy(model)
    trained(copy, copy)
    assert_same({**model.state_dict()}, {**net().state_dict()})  # the copy's calls are its own


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("block.*", "no module has a name like 'block.*' (did you mean 'blocks.*'?); there are blocks.0, "),
        ("blocks", "no module has a name like 'blocks' (did you mean 'blocks.*'?); there are blocks.0, "),
    ],
)
def test_a_pattern_of_nothing_that_is_called_is_refused(pattern: str, message: str) -> None:
    """A list of modules is not: its modules are."""
    with pytest.raises(ConfigError) as refused:
        net(pattern)
    assert str(refused.value).startswith(f"model.checkpointing: {message}")


def test_a_module_that_changes_what_it_is_given_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True), nn.Linear(2, 2))
    prepare(model, MlpModel(checkpointing=["1"]))
    with pytest.raises(
        ConfigError, match=r"^model.checkpointing: 1 changes what it is given in place, so that it cannot"
    ):
        model(torch.randn(3, 2))


def test_compiled_models_are_refused() -> None:
    run: dict[str, Any] = {"epochs": 1, "model": {"name": "mlp", "checkpointing": ["1"]}, "compile": True}
    with pytest.raises(ValueError, match="checkpointing does not go with compile, which decides by itself what is"):
        RunConfig.model_validate(run)


def in_a_group(rank: int, world_size: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    results = []
    for patterns in ([], ["blocks.*"]):
        model = Net()
        prepare(model, MlpModel(freeze=["blocks.0.*"], checkpointing=patterns))
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        result = trained(wrapped, model)
        assert all((result.pop(f"{name}.grad") is None) for name in frozen)
        results.append(result)
    assert_same(*results)
    gathered = [torch.empty_like(model.head.weight) for _ in range(world_size)]
    dist.all_gather(gathered, model.head.weight.detach())
    assert torch.equal(*gathered)
    dist.destroy_process_group()


def test_frozen_and_recomputed_parts_go_with_ddp() -> None:
    start_ranks(in_a_group, 2, free_port(), workers=2)
