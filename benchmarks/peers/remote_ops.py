"""Chains of small tensor ops, y = y + 1 on a 4 x 4 tensor, through what a user has today."""

import json
import os
import time

import torch

OPS = 5000


def show(peer: str, ops_per_s: float, round_trip_us: float) -> None:
    print(
        json.dumps({"peer": peer, "ops_per_s": round(ops_per_s), "add_and_fetch_us": round(round_trip_us)}), flush=True
    )


def median_us(call, times: int = 300) -> float:
    for _ in range(50):
        call()
    taken = []
    for _ in range(times):
        begun = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begun)
    return sorted(taken)[times // 2] * 1e6


def local() -> None:
    with torch.no_grad():
        y, begun = torch.ones(4, 4), time.perf_counter()
        for _ in range(OPS):
            y = y + 1
        show("local eager torch", OPS / (time.perf_counter() - begun), median_us(lambda: (y + 1).clone()))


def ray_actor() -> None:
    import ray

    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)

    @ray.remote(num_cpus=0)
    class Tensors:
        def __init__(self):
            torch.set_num_threads(1)
            self.held = {0: torch.ones(4, 4)}

        def add(self, out, a, b):
            self.held[out] = self.held[a] + b

        def fetch(self, a):
            return self.held[a]

    actor = Tensors.remote()
    ray.get(actor.fetch.remote(0))
    begun = time.perf_counter()
    for i in range(OPS):
        actor.add.remote(i + 1, i, 1)
    ray.get(actor.fetch.remote(OPS))
    rate = OPS / (time.perf_counter() - begun)

    def round_trip():
        actor.add.remote(1, 0, 1)
        ray.get(actor.fetch.remote(1))

    show("ray actor, a call per op", rate, median_us(round_trip))
    ray.shutdown()


def rpc_worker(rank: int) -> None:
    import torch.distributed.rpc as rpc

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29517")
    torch.set_num_threads(1)
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=2)
    if rank == 0:
        y = start = rpc.remote("worker1", torch.ones, args=((4, 4),))
        y.to_here()
        begun = time.perf_counter()
        for _ in range(OPS):
            y = y.remote().add(1)
        y.to_here()
        rate = OPS / (time.perf_counter() - begun)
        show("torch.distributed.rpc RRef", rate, median_us(lambda: start.remote().add(1).to_here()))
    rpc.shutdown()


if __name__ == "__main__":
    import torch.multiprocessing as mp

    local()
    mp.spawn(rpc_worker, nprocs=2)
    ray_actor()
