"""Collectives and DDP among real processes that talk through gloo, and within one process."""

import errno
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray.train.torch
import torch
import torch.distributed as dist
from reductions import REDUCTIONS
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raytorch.distributed import (
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
from raytorch.distributed.collectives import all_gather, all_reduce, broadcast, reduce_scatter
from raytorch.errors import Cause, ReaderDiedError, StorageError, UserError

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
        (ReaderDiedError("data.readers: reader 1 of 2 died of SIGKILL"), Cause.LOST_WORKER),
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
