"""What a client asks of a cluster before it sends anything. No Ray runs here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raytorch.config import RunConfig
from raytorch.errors import ResourceError
from raytorch.service import client as client_module
from raytorch.service.capacity import Node
from raytorch.service.client import Client, EntrypointResources


class Nodes:
    """A connection to a cluster that has one node with a CPU, and may have lost another."""

    url = "http://head:8265"
    lost = False

    def nodes(self) -> list[Node]:
        return [Node("a", {"CPU": 1.0})]

    def has_lost_nodes(self) -> bool:
        return self.lost


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Nodes:
    there = Nodes()
    monkeypatch.setattr(client_module, "Connection", lambda address: there)
    monkeypatch.setattr(Client, "_send", lambda self, job_id, *_: job_id)
    return there


def send_run(tmp_path: Path) -> Any:
    config = {"epochs": 1, "storage": str(tmp_path), "scaling": {"workers": 2}}
    return Client().submit(RunConfig.model_validate(config), name="mine")


def send_script(tmp_path: Path) -> Any:
    script = tmp_path / "wide.py"
    script.touch()
    return Client().submit_script(script, name="mine", storage=str(tmp_path), resources=EntrypointResources(cpus=2))


@pytest.mark.parametrize("send", [send_run, send_script])
def test_a_cluster_that_has_lost_a_node_is_not_judged(
    cluster: Nodes, tmp_path: Path, send: Callable[[Path], Any]
) -> None:
    with pytest.raises(ResourceError):
        send(tmp_path)
    cluster.lost = True
    assert send(tmp_path) == "mine"
