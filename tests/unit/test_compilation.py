"""What is compiled of a model, and how often."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lone_runs import final, train, without_ray
from torch import nn
from torch._dynamo.utils import counters

from raytorch.config import GptModel
from raytorch.distributed.sharding import Sharding, shard
from raytorch.models.networks import Architecture
from raytorch.training.compilation import blocks_alike, compiled

# PyTorch's tracing hides this warning by the way it is shown, which does not help where each is an error.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def tracing_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Count graphs from 0, and run them as they are traced."""
    to_graphs = torch.compile

    def traced(*given: Any, **named: Any) -> Any:
        return to_graphs(*given, **{**named, "backend": "eager"})

    monkeypatch.setattr(torch, "compile", traced)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def gpt(**keys: Any) -> nn.Module:
    torch.manual_seed(0)
    model = GptModel(**{"dim": 16, "heads": 2, "layers": 6, **keys})
    return Architecture.of(model, {"vocabulary": 65, "context": 16}, None).build()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def calls() -> int:
    """Operations in all graphs."""
    return int(counters["stats"]["calls_captured"])


def test_a_decoder_of_six_layers_compiles_one_block_and_computes_the_same() -> None:
    tokens = torch.arange(32).view(2, 16)
    compiled(gpt(layers=2))(tokens)
    of_two = calls()
    torch._dynamo.reset()
    counters.clear()
    model = gpt()
    expected = model(tokens)
    names = list(model.state_dict())
    net = compiled(model)
    torch.autograd.backward(net(tokens).square().mean())
    assert (graphs(), calls()) == (1, of_two)
    torch.testing.assert_close(net(tokens), expected)
    assert list(net.state_dict()) == names


@pytest.fixture
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    yield
    dist.destroy_process_group()


def sharded(model: nn.Module) -> nn.Module:
    shard(model, [f"blocks.{layer}" for layer in range(6)], Sharding(((0,),), torch.device("cpu"), compile=True))
    return model


def data_parallel(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(compiled(model), gradient_as_bucket_view=True)


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("parallel", [sharded, data_parallel])
def test_several_workers_compile_one_block_each(parallel: Callable[[nn.Module], nn.Module]) -> None:
    model, tokens = gpt(), torch.arange(32).view(2, 16)
    expected = model(tokens)
    net = parallel(model)
    for _ in range(2):
        outputs = net(tokens)
        torch.autograd.backward(outputs.square().mean())
    assert graphs() == 1
    assert calls() < 100  # which all six have several times
    torch.testing.assert_close(outputs, expected)


class Outer(nn.Module):
    """Blocks in a list, beside other modules."""

    def __init__(self, blocks: list[nn.Module], others: int = 1) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.others = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(others)) if others else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def block(width: int = 4, rate: float = 0.0, *, frozen: bool = False) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.Dropout(rate), nn.Linear(width, 4)).requires_grad_(not frozen)


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (Outer([block() for _ in range(3)]), 3),
        (Outer([block(), block(), block(8)]), 0),
        (Outer([block(), block(rate=0.1)]), 0),
        (Outer([block(), block(frozen=True)]), 0),
        (Outer([block()]), 0),
        (nn.Sequential(block(), block(), *[nn.Linear(4, 4) for _ in range(9)]), 0),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), 0),
    ],
    ids=["alike", "of two widths", "of two rates", "frozen in part", "one", "few beside the rest", "no blocks"],
)
def test_blocks_are_compiled_one_by_one_where_they_are_alike_and_most_of_the_model(
    model: nn.Module, count: int
) -> None:
    assert len(blocks_alike(model)) == count
    net = compiled(model)
    assert (net is model) == bool(count)
    net(torch.ones(2, 4, requires_grad=True))
    assert graphs() == 1


@pytest.mark.parametrize("model", [{"name": "vit", "dim": 16, "heads": 2, "layers": 3, "patch": 4}, {"name": "mlp"}])
def test_a_run_that_compiles_comes_to_the_same(
    model: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: dict[str, Any] = {"epochs": None, "steps": 8, "ema": {"decay": 0.9}, "clip_norm": 1.0, "accumulate": 2}
    with without_ray(tmp_path, monkeypatch):
        expected = final(train("plain", model, **keys))
        assert graphs() == 0
        found = final(train("compiled", model, compile=True, **keys))
        assert 1 <= graphs() <= 4
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)
