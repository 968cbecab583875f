"""Collectives and DDP among real processes that talk through gloo, and within one process."""

import os
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from raytorch.distributed import (
    Worker,
    all_gather,
    all_reduce_sum,
    broadcast_buffers,
    device_name,
    gradient_sync,
    is_lost_peer,
    leaving_process_group,
)

CPU = torch.device("cpu")


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


# -- within one process ------------------------------------------------------------------------------------------------


def check_collectives_of_one() -> None:
    tensor = torch.tensor([1.0, 2.0])
    assert all_reduce_sum(tensor) is tensor
    assert tensor.tolist() == [1, 2]
    assert all_gather(tensor).tolist() == [[1, 2]]
    module = nn.BatchNorm1d(2)
    broadcast_buffers(module)
    assert module.running_var is not None
    assert module.running_var.tolist() == [1, 1]


def test_without_a_group_collectives_are_trivial() -> None:
    assert not dist.is_initialized()
    check_collectives_of_one()


@pytest.mark.usefixtures("group_of_one")
def test_in_a_group_of_one_collectives_are_trivial() -> None:
    check_collectives_of_one()


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("wrap", [lambda module: module, torch.compile])
def test_gradients_are_averaged_only_where_wanted(wrap: Callable[[nn.Module], nn.Module]) -> None:
    parallel = DistributedDataParallel(nn.Linear(2, 2))
    net = wrap(parallel)
    with gradient_sync(net, enabled=False):
        assert not parallel.require_backward_grad_sync
    with gradient_sync(net, enabled=True):
        assert parallel.require_backward_grad_sync


def test_a_module_without_ddp_has_nothing_to_average() -> None:
    with gradient_sync(nn.Linear(2, 2), enabled=False):
        pass


@pytest.mark.usefixtures("group_of_one")
def test_the_group_is_left_when_the_block_ends_well() -> None:
    with leaving_process_group():
        assert dist.is_initialized()
    assert not dist.is_initialized()
    with leaving_process_group():
        pass


@pytest.mark.usefixtures("group_of_one")
def test_the_group_stays_after_an_error_so_that_nothing_waits_for_lost_peers() -> None:
    with pytest.raises(ZeroDivisionError), leaving_process_group():
        raise ZeroDivisionError
    assert dist.is_initialized()


def test_a_cpu_has_no_product_name() -> None:
    assert device_name(CPU) == "cpu"


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (dist.DistNetworkError("the store is gone"), True),
        (dist.DistBackendError("NCCL error: remote process exited"), True),
        (ConnectionResetError("by peer"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4321"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (ValueError("gloo"), False),
        (FileNotFoundError("data"), False),
    ],
)
def test_lost_peers_are_told_from_mistakes(error: BaseException, lost: bool) -> None:
    assert is_lost_peer(error) is lost


# -- among two processes -----------------------------------------------------------------------------------------------


def collect(worker: Worker) -> None:
    tensor = torch.tensor([worker.rank + 1.0, 10.0])
    assert all_reduce_sum(tensor) is tensor
    assert tensor.tolist() == [3, 20]
    assert all_gather(torch.tensor([worker.rank, 7])).tolist() == [[0, 7], [1, 7]]
    assert all_gather(torch.full((3,), worker.rank, dtype=torch.uint8)).dtype == torch.uint8

    norm = nn.BatchNorm1d(2)
    assert norm.running_mean is not None
    norm.running_mean.fill_(worker.rank + 5)
    broadcast_buffers(norm)
    assert norm.running_mean.tolist() == [5, 5]


def accumulate_over_ddp(worker: Worker) -> None:
    """Two micro-batches on each of two ranks give the gradient of all four together."""
    torch.manual_seed(0)
    model, inputs = nn.Linear(3, 1), torch.randn(4, 3)
    net = DistributedDataParallel(model)
    mine = inputs[2 * worker.rank : 2 * worker.rank + 2]
    for number, sample in enumerate(mine):
        with gradient_sync(net, enabled=number == 1):
            torch.autograd.backward(net(sample).sum() / 2)
        if number == 0:
            assert model.weight.grad is not None
            torch.testing.assert_close(model.weight.grad, sample[None] / 2)  # of this rank alone
    torch.testing.assert_close(model.weight.grad, inputs.mean(0, keepdim=True))


def lose_a_peer(worker: Worker, folder: Path) -> None:
    dist.barrier()
    if worker.rank == 1:
        os._exit(0)  # as if it had been killed, without a word to its peer
    try:
        while True:
            all_reduce_sum(torch.ones(1))
    except Exception as error:
        (folder / "verdict").write_text(f"{is_lost_peer(error)}\n{traceback.format_exc()}")


def _rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    rendezvous, timeout = f"file://{folder}/rendezvous", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=timeout)
    worker = Worker(rank, 2, CPU)
    collect(worker)
    accumulate_over_ddp(worker)
    lose_a_peer(worker, folder)


def test_two_workers_collect_accumulate_and_know_a_lost_peer_from_a_mistake(tmp_path: Path) -> None:
    spawn(_rank, args=(tmp_path,), nprocs=2)  # what either of them raises fails the test
    verdict = (tmp_path / "verdict").read_text()
    assert verdict.startswith("True\n"), verdict
