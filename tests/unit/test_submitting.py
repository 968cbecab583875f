"""What a client asks of a cluster before it sends anything. No Ray runs here."""

import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from raytorch.cluster.capacity import Node
from raytorch.config import RunConfig
from raytorch.errors import ResourceError
from raytorch.service import client as client_module
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
    monkeypatch.setattr(client_module, "DashboardConnection", lambda address: there)
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


# -- where the script is -----------------------------------------------------------------------------------------------


def run_as_sent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, arguments: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Do with a script what a cluster would: unpack what is sent, and run the command there."""
    sent: dict[str, Any] = {}

    def send(_: Client, job_id: str, name: str, kind: str, run: str, command: str, fill: Any, *rest: Any) -> str:
        fill(tmp_path / "project.zip")
        sent["command"] = command
        return job_id

    monkeypatch.setattr(Client, "_send", send)
    Client().submit_script(script, arguments, storage=str(tmp_path / "records"))
    with zipfile.ZipFile(tmp_path / "project.zip") as package:
        package.extractall(tmp_path / "node")
    command = sent["command"].replace("python", sys.executable, 1)
    return subprocess.run(command, shell=True, cwd=tmp_path / "node", capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("where", "script"),
    [
        ("project", "train.py"),
        ("project", "./train.py"),
        ("project", "lib/../train.py"),
        ("project/lib", "../train.py"),
        ("project", "-x.py"),
        ("project", "./-x.py"),
        ("project/lib", "../-x.py"),
        ("project", "lib/sub.py"),
        (".", "project/lib/../train.py"),
        ("project", "linked/train.py"),
        ("project", "a 'b'\n$(c).py"),
    ],
)
def test_a_script_runs_with_its_project_wherever_it_is_called_from(
    cluster: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, script: str
) -> None:
    here = tmp_path / "here"
    (here / "project" / "lib").mkdir(parents=True)
    for name in ("train.py", "-x.py", "lib/sub.py", "a 'b'\n$(c).py"):
        (here / "project" / name).write_text(
            "import sys, settings; print('ran with', settings.STEPS, sys.argv[1:])", encoding="utf-8"
        )
        ((here / "project" / name).parent / "settings.py").write_text("STEPS = 3", encoding="utf-8")
    (here / "project" / "linked").symlink_to(".")
    monkeypatch.chdir(here / where)
    ran = run_as_sent(monkeypatch, tmp_path, script, ["--flag", "-", "a b"])
    assert (ran.returncode, ran.stdout) == (0, "ran with 3 ['--flag', '-', 'a b']\n"), ran.stderr


def test_what_is_left_out_is_said(
    cluster: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    project = tmp_path / "project"
    (project / "data").mkdir(parents=True)
    (project / "train.py").touch()
    (project / "notes.txt").symlink_to("/etc/hostname")
    assert run_as_sent(monkeypatch, tmp_path, str(project / "train.py")).returncode == 0
    assert caplog.messages == [
        f"not sent from {project}: data (left out by its name), notes.txt (leads out of the project, to /etc/hostname)"
    ]
    assert not (tmp_path / "node" / "notes.txt").exists()
