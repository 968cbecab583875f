"""What each worker holds of a model: python benchmarks/sharding.py [--workers 1,2,4] [--width 1024] [--blocks 12]

Takes two steps of AdamW with a model of 100 million parameters, with each strategy and number of workers on this
machine, one after the other, and prints of the worker that has most: bytes of weights, gradients and optimizer, by what
its tensors take, beside all of the model's; and by how much the process has grown at its largest since before the model
was made.
"""

import argparse
import os
import resource
import socket
from collections.abc import Callable
from datetime import timedelta
from importlib import import_module
from operator import itemgetter

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from raytorch.config import RunConfig
from raytorch.distributed import Worker
from raytorch.distributed.collectives import all_gather
from raytorch.distributed.shards import own_part
from raytorch.system.allocator import return_freed_memory
from raytorch.training.model_shards import ModelShards
from raytorch.training.precision import Precision

MB = 2**20


class Block(nn.Module):
    """Two layers beside which the input passes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.relu(self.up(x)))
        return out


class Net(nn.Sequential):
    """Blocks, one after the other."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__(*(Block(width) for _ in range(blocks)))


def net_of(strategy: str, worker: Worker, build: Callable[[], nn.Module]) -> nn.Module:
    """The model as a worker of a run has it."""
    run = RunConfig.model_validate({"epochs": 1, "parallel": {"strategy": strategy}, "precision": "fp32"})
    shards = ModelShards.of(run, worker, Precision.choose("fp32", worker.device))
    if shards is None:
        return DistributedDataParallel(build(), gradient_as_bucket_view=True) if worker.world_size > 1 else build()
    net, _ = shards.built(lambda: (build(), None), itemgetter(0))
    shards.divide("model", net)
    return net


def measured(strategy: str, worker: Worker, width: int, blocks: int) -> list[float]:
    """Bytes of weights, gradients and optimizer on this worker, and by how much its process has grown."""
    before = peak()
    net = net_of(strategy, worker, lambda: Net(width, blocks))
    optimizer = torch.optim.AdamW(net.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        torch.autograd.backward(net(torch.ones(1, width)).square().mean())
        optimizer.step()
    parameters = list(net.parameters())
    gradients = [each.grad for each in parameters if each.grad is not None]
    remembered = [value for each in optimizer.state.values() for value in each.values()]
    sizes = [sum(own_part(each).nbytes for each in kind) for kind in (parameters, gradients, remembered)]
    return [*map(float, sizes), peak() - before]


def peak() -> float:
    """The largest size in memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def on_rank(rank: int, workers: int, port: int, strategy: str, width: int, blocks: int) -> None:
    """Measure as one of several workers; the first prints the most of all."""
    torch.set_num_threads(1)
    if strategy != "ddp":  # as a run does
        return_freed_memory()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=workers, timeout=timedelta(minutes=10))
    if strategy != "ddp":
        import_module("torch.distributed.fsdp")  # before anything is measured
    every = all_gather(torch.tensor(measured(strategy, Worker(rank, workers, torch.device("cpu")), width, blocks)))
    if rank == 0:
        weights, gradients, optimizer, _ = every.amax(dim=0).tolist()
        held, whole = weights + gradients + optimizer, 16 * 8 * width**2 * blocks  # four numbers for each weight
        print(
            f"{workers:>7}  {strategy:<8}  {weights / MB:>7,.0f}  {gradients / MB:>9,.0f}  {optimizer / MB:>9,.0f}  "
            f"{held / MB:>9,.0f}  {held / whole:>8.2f}  {every[0, 3] / MB:>13,.0f}  {every[-1, 3] / MB:>10,.0f}",
            flush=True,
        )
    dist.barrier()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", default="1,2,4")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=12)
    given = parser.parse_args()
    print("workers  strategy  weights  gradients  optimizer  MB in all  of whole  grown, rank 0   last rank")
    for workers in map(int, given.workers.split(",")):
        for strategy in ("ddp", "fsdp") if workers > 1 else ("ddp",):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            spawn(on_rank, (workers, port, strategy, given.width, given.blocks), nprocs=workers)


if __name__ == "__main__":
    main()
