"""The cluster that a job is to be sent to: which paths hold there, what fits on its nodes. Imports ray when used."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from raytorch.cluster.capacity import require_capacity, require_node, run_here
from raytorch.config import RunConfig, data_root
from raytorch.errors import UserError
from raytorch.runs.plan import placed
from raytorch.runs.weights_source import is_weights_file
from raytorch.service.dashboard import DashboardConnection, Nodes


@dataclass(frozen=True)
class EntrypointResources:
    """Resources that a script's own process reserves, where it computes itself; a driver that only waits needs none."""

    cpus: float = 0
    gpus: float = 0
    memory: int = 0
    """Bytes."""

    def named(self) -> dict[str, float]:
        """Resources that are asked for, by Ray's names."""
        amounts = {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory}
        return {kind: amount for kind, amount in amounts.items() if amount}


class Destination:
    """A cluster as it is when one job is sent. Its nodes are listed once, and only if something depends on them."""

    def __init__(self, connection: DashboardConnection) -> None:
        self._connection = connection

    @cached_property
    def _nodes(self) -> Nodes:
        return self._connection.nodes()

    def require_reached(self, path: str, key: str, kind: str = "folder") -> None:
        """Refuse a path that is not the same on every node: a relative one, unless the cluster runs here."""
        is_full = "://" in path or Path(path).is_absolute()
        if not is_full and not run_here(self._nodes.up):
            raise UserError(
                f"{key}: {path} is a {kind} of this machine, and the cluster at {self._connection.url} runs elsewhere; "
                f"give a {kind} that all of its nodes reach, from / on, or a URI such as s3://bucket/runs"
            )

    def config(self, config: RunConfig) -> RunConfig:
        """``config`` with paths that hold on the cluster."""
        if (root := data_root(config.data)) is not None:
            self.require_reached(root, "data.root")
        weights = config.model.weights
        if weights and (is_weights_file(weights) or "/" in weights):
            self.require_reached(weights, "model.weights", "file" if is_weights_file(weights) else "folder")
        self.require_reached(config.storage, "storage")
        return placed(config, config.name, config.storage)

    def require_room(self, config: RunConfig) -> None:
        """Refuse a run that could never start; a cluster that has lost a node, which may come back, is not judged."""
        if not self._nodes.has_lost:
            require_capacity(self._nodes.up, config.scaling.min_workers, config.scaling.worker_resources)

    def require_node(self, resources: EntrypointResources) -> None:
        """Refuse a script that no node could hold; see :meth:`require_room`."""
        if resources.named() and not self._nodes.has_lost:
            require_node(self._nodes.up, resources.named())
