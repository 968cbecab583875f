"""What a client asks of a cluster before it sends anything. No Ray runs here."""

import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from run_folders import started
from typer.testing import CliRunner

from raytorch.cli.main import app, main
from raytorch.cluster.capacity import Node
from raytorch.config import RunConfig
from raytorch.config.file import load_config
from raytorch.errors import ConfigError, ResourceError, UserError
from raytorch.runs.storage import RunFolder
from raytorch.service import client as client_module
from raytorch.service import destination
from raytorch.service.client import Client
from raytorch.service.dashboard import Nodes
from raytorch.service.destination import EntrypointResources


class Cluster:
    """A connection to a cluster that has one node with a CPU, and may have lost another."""

    url = "http://head:8265"
    lost = False
    listed = 0

    def nodes(self) -> Nodes:
        self.listed += 1
        return Nodes([Node("a", {"CPU": 1.0})], self.lost)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    there = Cluster()
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
    cluster: Cluster, tmp_path: Path, send: Callable[[Path], Any]
) -> None:
    with pytest.raises(ResourceError):
        send(tmp_path)
    cluster.lost = True
    assert send(tmp_path) == "mine"


def test_the_nodes_are_listed_once_for_a_job(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(destination, "run_here", lambda nodes: True)
    monkeypatch.chdir(tmp_path)
    Path("train.py").touch()
    Client().submit(RunConfig.model_validate({"epochs": 1, "data": {"name": "mnist"}}))
    assert cluster.listed == 1
    Client().submit_script("train.py", resources=EntrypointResources(cpus=1))
    assert cluster.listed == 2
    Client().submit_script("train.py", storage="/shared/runs")
    assert cluster.listed == 2


def test_an_empty_name_is_refused_not_replaced(cluster: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.touch()
    with pytest.raises(ConfigError, match=r"^name '': must be "):
        Client().submit(RunConfig.model_validate({"epochs": 1, "storage": str(tmp_path)}), name="")
    with pytest.raises(ConfigError, match=r"^name '': must be "):
        Client().submit_script(script, name="", storage=str(tmp_path))


# -- where the run is --------------------------------------------------------------------------------------------------


def run_that_is_left(state: str = "finished") -> RunFolder:
    """A run below the current folder that has come to its end, as far as its record says so."""
    folder = started(RunConfig.model_validate({"epochs": 1}))
    folder.write_json("summary.json", {"state": state, "started": "2026-01-01", "step": 5})
    return folder


def test_a_run_that_has_finished_is_not_sent_again(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = run_that_is_left()
    with pytest.raises(
        UserError, match=r"has finished and nothing is left .* more epochs or steps; .*/mine/summary\.json$"
    ):
        Client().resume(str(folder))
    more = load_config(Path("runs/mine/config.yaml"), ["epochs=2"])
    assert Client().resume(str(folder), more).startswith("mine-")  # type: ignore[attr-defined]


@pytest.mark.parametrize("changes", [[], ["--set", "epochs=2"]])
@pytest.mark.parametrize("run", ["mine", "runs/mine"])
def test_a_run_of_this_machine_is_not_sent_elsewhere(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: str, changes: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(destination, "run_here", lambda nodes: False)
    run_that_is_left("stopped")
    done = CliRunner().invoke(app, ["submit", "--resume", run, *changes])
    assert isinstance(done.exception, UserError)
    assert str(done.exception).startswith("run: runs/mine is a folder of this machine, and the cluster at http://head")


# -- where the script is -----------------------------------------------------------------------------------------------


def run_as_sent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, arguments: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Do with a script what a cluster would: unpack what is sent, and run the command there."""
    sent: dict[str, Any] = {}

    def send(_: Client, job_id: str, kind: str, run: str, command: str, fill: Any, *rest: Any) -> str:
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
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, script: str
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
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
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


FORM = (
    "must be FILE.py:NAME, as in nets.py:Net, not {!r}: name a file of the project, and what it defines; what is inst"
)


@pytest.mark.parametrize("key", ["model", "loop"])
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("os:system", FORM.format("os:system")),
        ("os.system", FORM.format("os.system")),
        ("../x.py:f", "../x.py has a '..'; give the path from the project's folder"),
        (
            "OUTSIDE/x.py:f",
            "OUTSIDE/x.py is an absolute path; give it from the configuration's or the project's folder",
        ),
        ("nets/:f", FORM.format("nets/:f")),
        ("folder.py:f", "folder.py cannot be read: it is not a file, but a folder, a pipe or a device"),
        (
            "link.py:f",
            "link.py is a link, or behind one, that leads out of the project, to OUTSIDE/x.py; put a copy in its ",
        ),
        ("missing.py:f", "no file missing.py in PROJECT; give the path of one that is, from there"),
        ("net.py:other", "net.py has no other at its top level; define it there"),
        ("net.py:Nett", "net.py has no Nett at its top level (did you mean 'Net'?)"),
        ("net.py:", FORM.format("net.py:")),
    ],
)
def test_own_code_that_a_configuration_names_wrongly_is_refused_without_being_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, told: str, key: str
) -> None:
    """With its line and what to do, before the cluster is asked for anything."""
    project, outside, trace = tmp_path / "project", tmp_path / "outside", tmp_path / "trace"
    for file in (project / "net.py", outside / "x.py", project.parent / "x.py"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"import pathlib\npathlib.Path({str(trace)!r}).touch()\nclass Net: ...\n", encoding="utf-8")
    for folder in (".git", "nets", "folder.py"):
        (project / folder).mkdir()
    (project / "link.py").symlink_to(outside / "x.py")
    name = name.replace("OUTSIDE", str(outside))
    (project / "run.yaml").write_text(f"epochs: 1\n{key}:\n  name: '{name}'\n", encoding="utf-8")
    monkeypatch.chdir(project)
    monkeypatch.setattr(client_module, "DashboardConnection", lambda address: pytest.fail("asked the cluster"))
    monkeypatch.setattr(sys, "argv", ["raytorch", "submit", "run.yaml"])
    with pytest.raises(SystemExit) as end:
        main()
    output, error = capsys.readouterr()
    told = told.replace("OUTSIDE", str(outside)).replace("PROJECT", str(project))
    assert end.value.code == 2
    assert error.startswith(f"run.yaml:3: {key}.name: {told}"), error
    assert error.count("\n") == 1
    assert output == ""
    assert not trace.exists()


def test_submitting_a_run_reads_its_code_and_runs_none_of_it(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "trace"
    (tmp_path / "net.py").write_text(
        f"import pathlib\npathlib.Path({str(trace)!r}).touch()\ndef net(num_classes: int): ...\n", encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    assert Client().submit(RunConfig.model_validate({"epochs": 1}), name="shipped") == "shipped"
    Path("run.yaml").write_text(f"epochs: 1\nmodel: net.py:net\nstorage: {tmp_path}\n", encoding="utf-8")
    assert Client().submit("run.yaml", name="mine") == "mine"
    assert not trace.exists()
