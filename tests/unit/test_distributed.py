"""Collectives and DDP among real processes that talk through gloo, and within one process."""

import errno
import itertools
import os
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from raytorch.causes import Cause
from raytorch.collectives import all_gather, all_reduce, broadcast, reduce_scatter
from raytorch.datasets import MicroBatch
from raytorch.distributed import (
    Worker,
    barrier,
    broadcast_buffers,
    data_parallel,
    destroy_process_group,
    device_name,
    failure_cause,
    gradient_sync,
    init_process_group,
    is_available,
    leaving_process_group,
)
from raytorch.errors import StorageError, UserError
from raytorch.step_timer import StepTimer

CPU = torch.device("cpu")
REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda all_ranks: all_ranks.sum(0),
    "mean": lambda all_ranks: all_ranks.mean(0),
    "product": lambda all_ranks: all_ranks.prod(0),
    "min": lambda all_ranks: all_ranks.amin(0),
    "max": lambda all_ranks: all_ranks.amax(0),
}
"""Every op, as plain PyTorch computes it from the tensors of all ranks."""


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


# -- within one process ------------------------------------------------------------------------------------------------


def check_collectives_of_one() -> None:
    tensor = torch.tensor([1.0, 2.0])
    for op in REDUCTIONS:
        assert all_reduce(tensor, op) is tensor
        assert reduce_scatter(tensor, op).tolist() == [1, 2]
        assert reduce_scatter([tensor], op).tolist() == [1, 2]
    assert broadcast(tensor) is tensor
    assert tensor.tolist() == [1, 2]
    for copy in (all_gather(tensor), reduce_scatter(tensor), reduce_scatter([tensor])):
        copy.zero_()
    assert tensor.tolist() == [1, 2]
    assert all_gather(tensor).tolist() == [[1, 2]]
    assert all_gather(torch.tensor(3)).tolist() == [3]
    barrier()
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


def test_a_process_on_its_own_joins_a_group_of_one_and_leaves_it() -> None:
    assert is_available()
    for _ in range(2):
        init_process_group("gloo")
        assert (dist.get_world_size(), dist.get_backend()) == (1, "gloo")
        init_process_group("gloo")  # is in one already
        destroy_process_group()
        assert not dist.is_initialized()
    destroy_process_group()


@pytest.mark.parametrize("collective", [all_reduce, reduce_scatter])
def test_mistaken_reductions_are_refused(collective: Callable[..., Tensor]) -> None:
    with pytest.raises(UserError, match=r"^op must be one of sum, mean, product, min, max, not 'avg'$"):
        collective(torch.ones(2), "avg")
    with pytest.raises(UserError, match=r"^the mean of torch.int64 is not an integer"):
        collective(torch.ones(2, dtype=torch.int64), "mean")


def test_a_rank_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match=r"^broadcast: src must be a rank from 0 to 0, not 1$"):
        broadcast(torch.ones(2), src=1)


def test_what_cannot_be_shared_out_is_refused() -> None:
    with pytest.raises(UserError, match=r"the list must hold a tensor per rank, 1, not 2"):
        reduce_scatter([torch.ones(2), torch.ones(2)])
    with pytest.raises(UserError, match=r"the first dimension of \(\) must be a multiple of 1"):
        reduce_scatter(torch.tensor(1.0))


@pytest.mark.usefixtures("group_of_one")
def test_gradients_are_averaged_only_where_wanted() -> None:
    parallel = DistributedDataParallel(nn.Linear(2, 2))
    with gradient_sync(parallel, enabled=False):
        assert not parallel.require_backward_grad_sync
    with gradient_sync(parallel, enabled=True):
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
    ("error", "cause"),
    [
        (dist.DistNetworkError("the store is gone"), Cause.LOST_WORKER),
        (dist.DistBackendError("NCCL error: remote process exited"), Cause.LOST_WORKER),
        (ConnectionResetError("by peer"), Cause.LOST_WORKER),
        (
            RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4321"),
            Cause.LOST_WORKER,
        ),
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"), Cause.LOST_WORKER),
        (dist.DistStoreError("wait timeout after 300000ms, keys: /default_pg/0/1"), Cause.TIMEOUT),
        (dist.DistBackendError("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)"), Cause.TIMEOUT),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), Cause.GPU_MEMORY),
        (torch.AcceleratorError("CUDA error: out of memory"), Cause.GPU_MEMORY),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), Cause.GPU_MEMORY),
        (dist.DistBackendError("NCCL error: unhandled cuda error. Cuda failure 'out of memory'"), Cause.GPU_MEMORY),
        (MemoryError(), Cause.HOST_MEMORY),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), Cause.HOST_MEMORY),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), Cause.ERROR),
        (ValueError("gloo timed out"), Cause.ERROR),
        (StorageError("s3://bucket/runs/a cannot be used"), Cause.STORAGE),
        (OSError(errno.EROFS, "Read-only"), Cause.STORAGE),
        (RuntimeError("[enforce fail at inline_container.cc:862] . PytorchStreamWriter failed"), Cause.STORAGE),
        (TimeoutError("of the user's"), Cause.ERROR),
        (FileNotFoundError("data"), Cause.ERROR),
        (ExceptionGroup("one", [ConnectionResetError("by peer")]), Cause.LOST_WORKER),
        (ExceptionGroup("two", [ConnectionResetError("by peer"), ValueError("mine")]), Cause.ERROR),
        (ExceptionGroup("two", [ValueError("mine"), ExceptionGroup("inner", [MemoryError()])]), Cause.HOST_MEMORY),
    ],
)
def test_the_cause_is_told_by_kind_and_text(error: BaseException, cause: Cause) -> None:
    assert failure_cause(error) is cause


@pytest.mark.parametrize("allocate", [lambda: torch.empty(2**55), lambda: bytearray(2**60)])
def test_memory_that_is_not_there_is_the_hosts(allocate: Callable[[], Any]) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as failure:
        allocate()
    assert failure_cause(failure.value) is Cause.HOST_MEMORY


@pytest.mark.usefixtures("group_of_one")
def test_a_model_is_wrapped_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(module: nn.Module, parallel_strategy_kwargs: dict[str, Any]) -> nn.Module:
        return DistributedDataParallel(module, **parallel_strategy_kwargs)  # as Ray Train does

    monkeypatch.setattr(ray.train.torch, "prepare_model", prepare)
    with warnings.catch_warnings(record=True, action="always") as told:
        assert isinstance(data_parallel(nn.BatchNorm1d(3)), DistributedDataParallel)
    assert told == []


WRITES_TOO_MUCH = """
import resource, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from raytorch.distributed import failure_cause
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
content, path = {"a": torch.zeros(100_000)}, sys.argv[1]
for write in (torch.save, save_file, lambda content, path: Path(path).write_bytes(bytes(400_000))):
    try:
        write(content, path)
    except Exception as error:
        print(failure_cause(error))
"""


def test_whatever_writes_to_a_full_disk_tells_of_the_storage(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITES_TOO_MUCH, str(tmp_path / "file")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "storage\n" * 3


# -- among two processes -----------------------------------------------------------------------------------------------


def of_every_rank(make: Callable[[torch.Generator], Tensor]) -> Tensor:
    """What both ranks know ``make`` to give on each, stacked."""
    return torch.stack([make(torch.Generator().manual_seed(rank)) for rank in range(2)])


SHAPES: dict[str, Callable[[torch.Generator], Tensor]] = {
    "floats": lambda generator: torch.randn(4, 3, generator=generator),
    "half": lambda generator: torch.randn(4, generator=generator).bfloat16(),
    "integers": lambda generator: torch.randint(-9, 9, (6,), generator=generator),
    "nothing": lambda generator: torch.randn(0, 3, generator=generator),
}
STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda tensor: tensor.clone(),
    "transposed": lambda tensor: tensor.t().contiguous().t() if tensor.dim() == 2 else tensor.clone(),
    "strided": lambda tensor: torch.stack([tensor, tensor * 0], dim=-1)[..., 0],
    "parameter": lambda tensor: nn.Parameter(tensor.clone(), requires_grad=tensor.is_floating_point()),
}


def reduce_every_way(worker: Worker) -> None:
    for (shape, make), (stride, laid_out), (op, expected) in itertools.product(
        SHAPES.items(), STRIDES.items(), REDUCTIONS.items()
    ):
        if shape == "integers" and op == "mean":
            continue
        case = f"{op} of {shape}, {stride}"
        all_ranks = of_every_rank(make)
        reduced = expected(all_ranks)

        tensor = laid_out(all_ranks[worker.rank])
        version = tensor._version
        assert all_reduce(tensor, op) is tensor
        assert_close(tensor.detach(), reduced, msg=case)
        assert tensor._version > version

        tensor = laid_out(all_ranks[worker.rank])
        for whole in (tensor, list(tensor.chunk(2)) if len(tensor) else [tensor, tensor]):
            part = reduce_scatter(whole, op)
            assert_close(part, reduced.chunk(2)[worker.rank] if len(tensor) else reduced, msg=case)
            assert not part.requires_grad
        assert_close(tensor.detach(), all_ranks[worker.rank], msg=case)


def collect(worker: Worker) -> None:
    for make, laid_out in itertools.product(SHAPES.values(), STRIDES.values()):
        all_ranks = of_every_rank(make)
        tensor = laid_out(all_ranks[worker.rank])
        gathered = all_gather(tensor)
        assert_close(gathered, all_ranks)
        assert not gathered.requires_grad
        for src in range(2):
            tensor = laid_out(all_ranks[worker.rank])
            assert broadcast(tensor, src) is tensor
            assert_close(tensor.detach(), all_ranks[src])

    for dtype in (torch.uint8, torch.bool, torch.complex64):
        tensor = torch.full((3,), worker.rank).to(dtype)
        assert_close(all_gather(tensor), torch.tensor([[0, 0, 0], [1, 1, 1]]).to(dtype))
        assert_close(broadcast(tensor, 1), torch.ones(3).to(dtype))
    assert_close(all_reduce(torch.tensor(worker.rank + 1j), "mean"), torch.tensor(0.5 + 1j))
    assert all_reduce(torch.tensor(worker.rank + 1)).item() == 3
    assert all_gather(torch.tensor(worker.rank)).tolist() == [0, 1]

    norm = nn.BatchNorm1d(2)
    assert norm.running_mean is not None
    norm.running_mean.fill_(worker.rank + 5)
    broadcast_buffers(norm)
    assert norm.running_mean.tolist() == [5, 5]


def change_what_a_graph_needs(worker: Worker) -> None:
    weight = torch.ones(2, requires_grad=True)
    product = (weight * 1).square()
    all_reduce(product)
    assert product.requires_grad
    root = (weight * 1).exp()
    all_reduce(root)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(root.sum())


def disagree(worker: Worker) -> None:
    """Each mistake is the same error on both ranks, and the group goes on."""
    mine = worker.rank
    for call in (
        lambda: all_reduce(torch.ones(3 + mine)),
        lambda: all_reduce(torch.ones(2, 3) if mine else torch.ones(3, 2)),
        lambda: all_reduce(torch.ones(2, dtype=torch.int32 if mine else torch.float32)),
        lambda: all_reduce(torch.ones(2), "max" if mine else "min"),
        lambda: all_gather(torch.ones(3 - mine)),
        lambda: broadcast(torch.ones(3 - mine)),
        lambda: broadcast(torch.ones(3), src=mine),
        lambda: reduce_scatter(torch.ones(4 - 2 * mine)),
        lambda: all_gather(torch.ones(2)) if mine else all_reduce(torch.ones(2)),
    ):
        with pytest.raises(UserError, match=r"^the workers disagree: rank 0: .*, rank 1: "):
            call()
    with pytest.raises(UserError) as caught:
        all_reduce(torch.ones(3 + mine), op="max")
    assert str(caught.value) == (
        "the workers disagree: rank 0: all_reduce(max) of float32 (3,), rank 1: all_reduce(max) of float32 (4,)"
    )
    with pytest.raises(UserError, match="from 0 to 1, not 2"):
        broadcast(torch.ones(1), src=2)
    with pytest.raises(UserError, match=r"the first dimension of \(3, 2\) must be a multiple of 2"):
        reduce_scatter(torch.ones(3, 2))
    assert all_reduce(torch.ones(1)).item() == 2


def leave_and_join_again(worker: Worker) -> None:
    """Neither rank waits for the other before it joins the next group."""
    for _ in range(5):
        destroy_process_group()
        assert all_reduce(torch.tensor(1)).item() == 1  # alone
        init_process_group("gloo", timeout_s=60)
        assert (dist.get_rank(), dist.get_world_size()) == (worker.rank, 2)
        assert all_reduce(torch.tensor(1)).item() == 2
        barrier()


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
            assert_close(model.weight.grad, sample[None] / 2)  # of this rank alone
    assert_close(model.weight.grad, inputs.mean(0, keepdim=True))


def wait_for_a_slower_rank(worker: Worker) -> None:
    """The faster rank waits in its backward pass; both know how long it took."""
    net = DistributedDataParallel(nn.Linear(8, 8))
    timer = StepTimer(net, CPU)
    batch = [MicroBatch(torch.randn(4, 8), torch.zeros(4), 1.0)]
    for _ in timer.steps([batch] * 3):
        time.sleep(0.2 * worker.rank)
        timer.backward(net(batch[0].inputs).sum())
    totals = timer.totals()
    assert (totals.steps, totals.samples) == (3, 12)
    assert totals.seconds > 0.4
    assert (totals.communication > totals.seconds / 2) == (worker.rank == 0)


def lose_a_peer(worker: Worker, folder: Path) -> None:
    dist.barrier()
    if worker.rank == 1:
        os._exit(0)  # as if it had been killed, without a word to its peer
    try:
        while True:
            all_reduce(torch.ones(1))
    except Exception as error:
        (folder / "verdict").write_text(f"{failure_cause(error)}\n{traceback.format_exc()}", encoding="utf-8")


def wait_in_vain(worker: Worker) -> None:
    impatient = dist.new_group(timeout=timedelta(seconds=1))
    if worker.rank == 0:
        with pytest.raises(RuntimeError) as failure:
            dist.all_reduce(torch.ones(1), group=impatient)
        assert failure_cause(failure.value) is Cause.TIMEOUT, failure.value
    dist.barrier()


def _rank(rank: int, folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))  # as Ray Train's workers do
    worker = Worker(rank, 2, CPU)
    reduce_every_way(worker)
    collect(worker)
    change_what_a_graph_needs(worker)
    disagree(worker)
    accumulate_over_ddp(worker)
    wait_for_a_slower_rank(worker)
    leave_and_join_again(worker)
    wait_in_vain(worker)
    lose_a_peer(worker, folder)


def test_two_workers_collect_accumulate_and_know_lost_peers_from_late_ones(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(_rank, args=(tmp_path, port), nprocs=2)  # what either of them raises fails the test
    verdict = (tmp_path / "verdict").read_text(encoding="utf-8")
    assert verdict.startswith("lost_worker\n"), verdict
