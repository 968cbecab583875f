"""What a cluster can never hold is told from what only has to wait."""

import subprocess
import sys
from secrets import token_hex

import pytest

from raytorch.cluster.capacity import Node, require_capacity, require_node, run_here
from raytorch.errors import ResourceError

HEAD = Node("a", {"memory": 1e9})
WORKERS = [Node("b", {"CPU": 2.0, "GPU": 1.0}), Node("c", {"CPU": 3.0})]


@pytest.mark.parametrize(
    ("workers", "each"),
    [(5, {"CPU": 1}), (2, {"CPU": 2}), (1, {"CPU": 1, "GPU": 1}), (2, {"CPU": 1, "GPU": 0.5}), (10, {"CPU": 0.5})],
)
def test_what_fits_is_let_in(workers: int, each: dict[str, float]) -> None:
    require_capacity([HEAD, *WORKERS], workers, each)


@pytest.mark.parametrize(
    ("workers", "each", "message"),
    [
        (
            6,
            {"CPU": 1},
            "6 workers with 1 CPU each need 6 CPUs, but the cluster has 5; "
            "lower scaling.workers or scaling.cpus_per_worker, or add nodes",
        ),
        (
            1,
            {"CPU": 4},  # there are enough, but not on one node
            "1 workers with 4 CPU each do not fit on the nodes, which have room for 0; "
            "lower scaling.workers or scaling.cpus_per_worker, or add nodes",
        ),
        (
            2,
            {"CPU": 1, "GPU": 1},
            "2 workers with 1 GPU each need 2 GPUs, but the cluster has 1; "
            "lower scaling.workers or scaling.gpus_per_worker, or add nodes",
        ),
    ],
)
def test_what_can_never_fit_is_refused(workers: int, each: dict[str, float], message: str) -> None:
    with pytest.raises(ResourceError) as refusal:
        require_capacity([HEAD, *WORKERS], workers, each)
    assert str(refusal.value) == message


def test_what_limits_is_to_be_lowered() -> None:
    nodes = [Node(name, {"CPU": 8.0, "GPU": 1.0}) for name in "ab"]
    with pytest.raises(
        ResourceError, match=r"room for 2; lower scaling.workers or scaling.gpus_per_worker, or add nodes$"
    ):
        require_capacity(nodes, 3, {"CPU": 1, "GPU": 0.6})


def test_a_cluster_of_one_node_elsewhere_is_not_this_machine() -> None:
    with pytest.raises(ResourceError, match="but the cluster has 2; "):
        require_capacity([Node(token_hex(28), {"CPU": 2.0})], 3, {"CPU": 1})


def test_a_script_larger_than_every_node_is_refused() -> None:
    require_node(WORKERS, {"CPU": 3})
    with pytest.raises(ResourceError) as refusal:
        require_node(WORKERS, {"CPU": 3, "GPU": 1})
    assert str(refusal.value) == (
        "no node of the cluster has 3 CPU and 1 GPU; lower what the entrypoint asks for, or add nodes"
    )


def test_a_cluster_that_can_grow_is_not_judged() -> None:
    require_capacity([Node("a", {}, scales=True)], 100, {"CPU": 1, "GPU": 1})
    require_node([Node("a", {}, scales=True)], {"GPU": 8})


def test_a_node_is_here_if_its_own_processes_are() -> None:
    here, elsewhere = Node("6fe1" * 14, {}), Node("9c0d" * 14, {})
    waiting = [sys.executable, "-c", "input()", f"--node-id={here.id}"]
    with subprocess.Popen(waiting, stdin=subprocess.PIPE) as process:
        assert run_here([here])
        assert not run_here([here, elsewhere])
        assert process.stdin
        process.stdin.close()
    assert not run_here([here])
    assert not run_here([])
