"""Sessions beside what a user would run instead: python benchmarks/sessions.py [--runs 5]

Times, in turn, chains of small tensor operations through local eager PyTorch, torch.distributed.rpc, a plain Ray actor
and a session with one worker; an addition whose result is fetched; and a tensor of 64 MB sent to a worker and fetched
from it, beside ray.put and ray.get of the same NumPy array. Prints medians, and the ratios of each round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

PEERS = Path(__file__).resolve().parent / "peers"
CHAIN = 20_000
LARGE = torch.ones(16 * 1024 * 1024)  # 64 MB


def medians(times: int, **calls: Callable[[], Any]) -> dict[str, float]:
    """Median seconds of each call, made in turn, so that all meet the machine and Ray's memory in the same state."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(times + max(3, times // 6)):
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            if number >= max(3, times // 6):  # the first ones warm up
                taken[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values) for name, values in taken.items()}


def peers() -> dict[str, dict[str, float]]:
    """What peers/remote_ops.py prints, by peer."""
    done = subprocess.run([sys.executable, PEERS / "remote_ops.py"], capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {row.pop("peer"): row for row in rows}


def session(*, gpu: bool = False, chain_length: int = CHAIN) -> dict[str, float]:
    """The same through a session, and large tensors beside Ray's object store. Runs in a process of its own.

    On a GPU, the chain through local eager PyTorch there as well.
    """
    import ray

    import raytorch

    class Store:
        def take(self, array: Any) -> None:
            pass

        def give(self) -> Any:
            return LARGE.numpy()

        def ping(self) -> None:
            pass

    with raytorch.connect(workers=1, gpus_per_worker=int(gpu)) as remote, torch.no_grad():
        store = ray.remote(num_cpus=0)(Store).remote()
        start = remote.ones(4, 4)

        def chain(start: Any = start) -> float:
            y, begun = start, time.thread_time()
            for _ in range(chain_length):
                y = y + 1
            recorded = time.thread_time() - begun
            y.sum().item()
            return recorded

        recording: list[float] = []
        whole = medians(9, chain=lambda: recording.append(chain()))["chain"]
        local = torch.ones(4, 4, device="cuda" if gpu else "cpu")
        eager = medians(9, chain=lambda: chain(local))["chain"]
        held = remote.tensor(LARGE)

        def send() -> None:
            remote.tensor(LARGE)
            remote.synchronize()

        small = medians(300, add=lambda: (start + 1).fetch(), ping=lambda: ray.get(store.ping.remote()))
        large = medians(
            9,
            send=send,
            put=lambda: ray.get(store.take.remote(ray.put(LARGE.numpy()))),
            fetch=held.fetch,
            get=lambda: ray.get(store.give.remote()),
        )
        return {
            "ops_per_s": chain_length / whole,
            "eager_ops_per_s": chain_length / eager,
            "record_us": statistics.median(recording) / chain_length * 1e6,
            "add_and_fetch_us": small["add"] * 1e6,
            "actor_round_trip_us": small["ping"] * 1e6,
            **{f"{name}_ms": seconds * 1e3 for name, seconds in large.items()},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--session", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--gpu", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.session:
        print(json.dumps(session(gpu=options.gpu, chain_length=CHAIN // 100 if options.tiny else CHAIN)))
        return
    rounds = []
    for _ in range(options.runs):
        others = peers()
        done = subprocess.run([sys.executable, __file__, "--session"], capture_output=True, text=True, check=True)
        rounds.append((others, json.loads(done.stdout.splitlines()[-1])))
    report(rounds)


def report(rounds: list[tuple[dict[str, dict[str, float]], dict[str, float]]]) -> None:
    """Print a row per comparison: the medians, and the ratios of each round as median (least to most)."""
    comparisons: dict[str, list[tuple[float, float]]] = {
        f"chain of {CHAIN:,} ops, ops/s: a session / {peer}": [
            (own["ops_per_s"], others[peer]["ops_per_s"]) for others, own in rounds
        ]
        for peer in rounds[0][0]
    }
    comparisons |= {
        "add and fetch, µs: a session / an actor's round trip": [
            (own["add_and_fetch_us"], own["actor_round_trip_us"]) for _, own in rounds
        ],
        "add and fetch, µs: a session / an actor that adds and fetches": [
            (own["add_and_fetch_us"], others["ray actor, a call per op"]["add_and_fetch_us"]) for others, own in rounds
        ],
        "send 64 MB, 1/ms: a session / put, and get by an actor": [
            (1 / own["send_ms"], 1 / own["put_ms"]) for _, own in rounds
        ],
        "fetch 64 MB, 1/ms: a session / get from an actor": [
            (1 / own["fetch_ms"], 1 / own["get_ms"]) for _, own in rounds
        ],
    }
    table = Table("", "session", "peer", "ratio", title=f"{len(rounds)} runs, {os.cpu_count()} cores")
    for name, pairs in comparisons.items():
        ratios = [own / other for own, other in pairs]
        own, other = (statistics.median(column) for column in zip(*pairs, strict=True))
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        table.add_row(
            name, f"{own:,.3g}" if own < 1 else f"{own:,.0f}", f"{other:,.3g}" if other < 1 else f"{other:,.0f}", spread
        )
    record = statistics.median(own["record_us"] for _, own in rounds)
    console = Console(width=120)
    console.print(table)
    console.print(f"recording an operation takes the client {record:.1f} µs of its thread's time")


if __name__ == "__main__":
    main()
