"""Capacity of a cluster: how many workers its nodes can hold at all, and whether they run on this machine."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from raytorch.errors import ResourceError

AUTOSCALER_LABEL = "ray.io/node-group"
"""Label of the nodes, a head among them, that Ray's autoscaler or KubeRay has started."""


@dataclass(frozen=True)
class Node:
    """A node that is up."""

    id: str
    resources: Mapping[str, float]
    """All that it has, in use or not: ``{"CPU": 8, "GPU": 1}``."""
    scales: bool = False
    """True if an autoscaler, which could add more nodes, has started it."""


def require_capacity(
    nodes: Sequence[Node],
    workers: int,
    each: Mapping[str, float],
    prefix: str = "scaling.",
    workers_key: str | None = None,
) -> None:
    """Refuse what the nodes could not hold even with nothing else running, which Ray would wait for without end.

    A cluster that can grow is not judged. Nor should one be that has lost a node, which may come back: a run, or a
    sweep's next trial, then waits for it.

    ``workers`` is their number, the least of an elastic run, and ``each`` is what each holds: ``{"CPU": 1, "GPU": 1}``.
    The user sets them by ``workers``, ``cpus_per_worker`` and ``gpus_per_worker`` behind ``prefix``, the first by
    ``workers_key`` if that is given. Raises ResourceError: they do not fit.
    """
    fitting = workers_that_fit([node.resources for node in nodes], each)
    if fitting >= workers or any(node.scales for node in nodes):
        return
    place = "this machine has" if len(nodes) == 1 and run_here(nodes) else "the cluster has"
    lower = f"lower {workers_key or f'{prefix}workers'} or {prefix}"
    more = ", or add nodes" if len(nodes) > 1 else ""
    for kind, amount in each.items():
        there = sum(node.resources.get(kind, 0) for node in nodes)
        if workers * amount > there:
            raise ResourceError(
                f"{workers} workers with {amount:g} {kind} each need {workers * amount:g} {kind}s, but {place} "
                f"{there:g}; {lower}{kind.lower()}s_per_worker{more}"
            )
    raise ResourceError(
        f"{workers} workers with {_listed(each)} each do not fit on the nodes, which have room for {fitting}; "
        f"{lower}{_scarcest(nodes, each).lower()}s_per_worker{more}"
    )


def require_resources(
    workers: int, each: Mapping[str, float], prefix: str = "scaling.", workers_key: str | None = None
) -> None:
    """Refuse what the cluster that was joined can never give; see :func:`require_capacity`."""
    if not _has_lost_nodes():
        require_capacity(_joined_nodes(), workers, each, prefix, workers_key)


def scales_itself() -> bool:
    """Tell whether the cluster that was joined could add nodes by itself to those that it has."""
    return any(node.scales for node in _joined_nodes())


def _joined_nodes() -> list[Node]:
    import ray

    return [
        Node(node["NodeID"], node["Resources"], AUTOSCALER_LABEL in node["Labels"])
        for node in ray.nodes()
        if node["Alive"]
    ]


def _has_lost_nodes() -> bool:
    """Tell whether a node of the cluster that was joined has crashed or was cut off, as Ray 2.55 and 2.60 say it; what
    it had they no longer tell."""
    import ray
    from ray.core.generated.common_pb2 import NodeDeathInfo

    lost = (NodeDeathInfo.UNEXPECTED_TERMINATION, NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED)
    return any(node["DeathReason"] in lost for node in ray.nodes() if not node["Alive"])


def workers_that_fit(nodes: Iterable[Mapping[str, float]], each: Mapping[str, float]) -> int:
    """How many workers that hold ``each`` fit on nodes of these resources; no worker spans two of them."""
    slack = 1e-9  # thirds and tenths do not add up to the bit
    wanted = {kind: amount for kind, amount in each.items() if amount}
    return sum(min(int(node.get(kind, 0) / amount + slack) for kind, amount in wanted.items()) for node in nodes)


def _scarcest(nodes: Sequence[Node], each: Mapping[str, float]) -> str:
    """What the fewest workers would have enough of."""
    resources = [node.resources for node in nodes]
    return min(each, key=lambda kind: workers_that_fit(resources, {kind: each[kind]}))


def require_node(nodes: Sequence[Node], each: Mapping[str, float]) -> None:
    """Refuse a process that is larger than every node; see :func:`require_capacity`."""
    if not any(node.scales or workers_that_fit([node.resources], each) for node in nodes):
        raise ResourceError(
            f"no node of the cluster has {_listed(each)}; lower what the entrypoint asks for, or add nodes"
        )


def run_here(nodes: Sequence[Node]) -> bool:
    """Tell whether all nodes run on this machine.

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
