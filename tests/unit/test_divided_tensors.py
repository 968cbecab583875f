"""Tensors that are divided over one or several dimensions of a mesh: their parts, and what is made of them."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor, nn

from raytorch.distributed import Worker
from raytorch.distributed.shards import (
    clip_gradients,
    divided_like,
    gathered,
    is_written_here,
    own_part,
    place_of,
)

SHAPES = {"rows": (5, 3), "columns": (3, 5), "replicated": (7, 2), "few": (2, 2)}
"""Of sizes that the number of ranks does not divide, or that are too few for them."""


class Net(nn.Module):
    def __init__(self, divided_over: Any) -> None:
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        super().__init__()
        placements = {"rows": Shard(0), "columns": Shard(1), "replicated": Replicate(), "few": Shard(0)}
        for name, tensor in whole_tensors().items():
            each = distribute_tensor(tensor, divided_over, [placements[name]]) if divided_over else tensor
            self.register_parameter(name, nn.Parameter(each))


def whole_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def net_on(shape: tuple[int, ...], names: tuple[str, ...]) -> Net:
    """A module that is divided over a mesh, of which the dimension ``tensor`` divides some of it by columns."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    net = Net(mesh["tensor"] if "tensor" in names else None)
    fully_shard(net, mesh=mesh[tuple(name for name in names if name != "tensor")])
    return net


def are_boxes_of_the_whole(worker: Worker, net: Net) -> None:
    for name, parameter in net.named_parameters():
        whole = whole_tensors()[name]
        shape, begin = place_of(parameter)
        own = own_part(parameter)
        assert shape == whole.shape
        box = tuple(slice(low, low + size) for low, size in zip(begin, own.shape, strict=True))
        assert torch.equal(own, whole[box])
        assert torch.equal(own_part(divided_like(parameter, whole)), own)
        written = torch.zeros(shape)
        if is_written_here(parameter):
            written[box] += 1
        dist.all_reduce(written)
        assert torch.equal(written, torch.ones(shape))  # each number once
        joined = gathered({"it": [parameter.detach()]})["it"][0]
        assert torch.equal(joined, whole) if worker.rank == 0 else joined is None


def are_clipped(net: Net) -> None:
    plain = [nn.Parameter(each) for each in whole_tensors().values()]
    for each, parameter in zip(plain, net.parameters(), strict=True):
        each.grad, parameter.grad = each.detach().clone(), parameter.detach().clone()
    nn.utils.clip_grad_norm_(plain, 0.7)
    clip_gradients(net.parameters(), 0.7)
    for each, parameter in zip(plain, net.parameters(), strict=True):
        assert each.grad is not None
        assert parameter.grad is not None
        torch.testing.assert_close(own_part(parameter.grad), own_part(divided_like(parameter, each.grad)))


def on_four(worker: Worker) -> None:
    for shape, names in [
        ((4,), ("shard",)),
        ((2, 2), ("copy", "shard")),
        ((2, 2), ("shard", "tensor")),
        ((1, 4), ("shard", "tensor")),
        ((2, 1, 2), ("copy", "shard", "tensor")),
    ]:
        net = net_on(shape, names)
        are_boxes_of_the_whole(worker, net)
        are_clipped(net)


def test_parts_are_boxes_of_the_whole_which_is_made_of_them() -> None:
    on_ranks(on_four, 4)


def test_what_is_not_divided_is_all_here() -> None:
    tensor = torch.ones(2, 3)
    assert place_of(tensor) == ((2, 3), (0, 0))
    assert place_of(torch.tensor(1.0)) == ((), ())
    assert is_written_here(tensor)
    assert divided_like(tensor, whole := torch.zeros(2, 3)) is whole


@pytest.mark.parametrize("most", [0.5, 100.0])
def test_gradients_that_are_not_divided_are_clipped_as_pytorch_does(most: float) -> None:
    tensors = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    for each in tensors:
        each.grad = torch.ones(3)
    clip_gradients(tensors, most)
    assert torch.stack([each.grad.norm() for each in tensors]).norm().item() == pytest.approx(min(most, 6**0.5))
