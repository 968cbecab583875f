"""What is counted as held by a value: its own tensors, and those that it keeps alive."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import StepLR

from raytorch.autograd import Context
from raytorch.session.registry import Registry, tensors_of


def kib() -> Tensor:
    """A tensor of 1,024 bytes."""
    return torch.zeros(256)


def held_bytes(value: Any) -> int:
    """The bytes of what a value holds, each storage counted once."""
    return sum(
        {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in tensors_of(value)}.values()
    )


def test_stats_count_gradients_and_the_state_of_optimizers_and_schedulers() -> None:
    registry, linear = Registry(), nn.Linear(16, 16, bias=False)
    adam = torch.optim.Adam(linear.parameters(), lr=0.1)
    for value in (linear, adam, StepLR(adam, 1)):
        registry.new(value)
    linear(torch.ones(1, 16)).sum().backward()
    adam.step()
    stats = registry.stats()
    assert stats["module"]["bytes"] == {"cpu": 2048}
    assert stats["optimizer"]["bytes"] == {"cpu": 2048 + 4}  # two moments, and the step
    assert stats["scheduler"]["bytes"] == {}
    assert held_bytes(StepLR(adam, 1)) == 4096 + 4
    linear.zero_grad()
    assert registry.stats()["module"]["bytes"] == {"cpu": 1024}


def test_what_is_nested_in_a_value_counts_once() -> None:
    context, cycle = Context(), [kib()]
    context.save_tensor(kib())
    context.save_value("more", {"deep": [kib()]})
    context.attribute = kib()
    assert held_bytes(context) == 3 * 1024
    cycle.append(cycle)  # type: ignore[arg-type]
    assert held_bytes({"cycle": cycle, "view": cycle[0][1:], "more": ({"one": kib()}, {"text", 3})}) == 2 * 1024


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize(
    ("sparse", "expected"),
    [
        (lambda: torch.eye(4).to_sparse(), 2 * 4 * 8 + 4 * 4),
        (lambda: torch.eye(4).to_sparse_csr(), (5 + 4) * 8 + 4 * 4),
        (lambda: torch.eye(4).to_sparse_csc(), (5 + 4) * 8 + 4 * 4),
        (lambda: torch.eye(4).to_sparse_bsr((2, 2)), (3 + 2) * 8 + 8 * 4),
        (lambda: torch.eye(4).to_sparse_bsc((2, 2)), (3 + 2) * 8 + 8 * 4),
    ],
    ids=["coo", "csr", "csc", "bsr", "bsc"],
)
def test_the_parts_of_a_sparse_tensor_are_counted(sparse: Callable[[], Tensor], expected: int) -> None:
    assert held_bytes(sparse().clone()) == expected  # a copy, as the conversion leaves room in its storages


def test_a_data_parallel_module_counts_what_is_in_it(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(nn.Linear(16, 16, bias=False))
        parallel(torch.ones(1, 16)).sum().backward()
        assert held_bytes(parallel) == 2048
    finally:
        torch.distributed.destroy_process_group()
