"""What a cluster's nodes can hold at all, and whether they run on this machine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raytorch.cluster import room
from raytorch.errors import ResourceError


@dataclass(frozen=True)
class Node:
    """A node that is up."""

    id: str
    resources: Mapping[str, float]
    """All that it has, in use or not: ``{"CPU": 8, "GPU": 1}``."""
    scales: bool = False
    """Whether an autoscaler, which could add more nodes, has started it."""


def require_capacity(nodes: Sequence[Node], workers: int, each: Mapping[str, float]) -> None:
    """Refuse what the nodes could not hold even with nothing else running, which Ray would wait for without end.

    A cluster that can grow is not judged. Nor should one be that has lost a node, which may come back; see
    ``Connection.has_lost_nodes``.

    Args:
        nodes: The cluster's nodes.
        workers: Number of workers, the least that an elastic run starts with.
        each: What each of them holds: ``{"CPU": 1, "GPU": 1}``.

    Raises:
        ResourceError: They do not fit.
    """
    fitting = room([node.resources for node in nodes], each)
    if fitting >= workers or any(node.scales for node in nodes):
        return
    wanted = _listed(each)
    there = " and ".join(f"{sum(node.resources.get(kind, 0) for node in nodes):g} {kind}" for kind in each)
    lower = " or ".join(f"scaling.{kind.lower()}s_per_worker" for kind in each)
    raise ResourceError(
        f"the cluster can never hold {workers} workers with {wanted} each: its {len(nodes)} nodes have {there} in all, "
        f"which is room for {fitting}; lower scaling.workers or {lower}, or add nodes"
    )


def require_node(nodes: Sequence[Node], each: Mapping[str, float]) -> None:
    """Refuse a process that is larger than every node; see :func:`require_capacity`.

    Raises:
        ResourceError: No node could hold it.
    """
    if not any(node.scales or room([node.resources], each) for node in nodes):
        raise ResourceError(f"no node of the cluster has {_listed(each)}; lower the --entrypoint options, or add nodes")


def run_here(nodes: Sequence[Node]) -> bool:
    """Whether all nodes run on this machine.

    A node's address could be that of another machine's loopback, reached through a forwarded port, but its random id
    is in the command lines of its own processes.
    """
    import ray  # noqa: F401 - it brings psutil along

    # isort: split
    import psutil

    lines = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    return bool(nodes) and all(any(node.id in line for line in lines) for node in nodes)


def _listed(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {kind}" for kind, amount in resources.items())
