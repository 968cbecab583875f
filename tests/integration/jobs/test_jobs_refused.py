"""What a cluster refuses to take or to tell, and whom."""

import os
import subprocess
import sys
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from job_cluster import QUICKSTART, Cluster, raytorch

from raytorch import Client
from raytorch.config.file import load_config
from raytorch.errors import (
    ClusterError,
    JobNotFoundError,
    PackageError,
    ResourceError,
    RunExistsError,
    UserError,
)


def test_a_request_without_the_token_is_refused(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("/api/jobs/", "/api/version", "/api/v0/nodes"):
        with pytest.raises(HTTPError) as refusal:
            urlopen(f"{cluster.url}{path}")
        assert refusal.value.code == 401
        refusal.value.close()
    with pytest.raises(HTTPError) as refusal:
        urlopen(Request(f"{cluster.url}/api/jobs/", headers={"Authorization": "Bearer wrong"}))
    assert refusal.value.code == 403
    refusal.value.close()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    told = raytorch(cluster, "jobs")
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr.startswith(
        f"the cluster at {cluster.url} refuses the token (HTTP 403); give the cluster's token"
    )
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setenv("HOME", str(cluster.home))
    with pytest.raises(ClusterError, match=r"asks for a token, and there is none here \(HTTP 401\)"):
        Client(cluster.url)


JOINING = """
import sys
from raytorch.cluster.joining import joined_ray

with joined_ray(sys.argv[1]):
    import ray

    print(ray.cluster_resources()["CPU"])
"""


def test_a_driver_takes_the_token_from_its_usual_places_for_any_address(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def join() -> tuple[str, str]:
        command = [sys.executable, "-c", JOINING, cluster.head]
        told = subprocess.run(command, capture_output=True, text=True, cwd=cluster.home, check=False)
        return told.stdout, told.stderr.rstrip().rpartition("\n")[2]

    assert join()[0] == "2.0\n"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    start = f"raytorch.errors.ClusterError: the cluster at {cluster.head}"
    assert join()[1].startswith(f"{start} refuses the token; give the cluster's token in one of RAY_AUTH_TOKEN, ")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setenv("HOME", str(cluster.home))
    assert join()[1].startswith(f"{start} asks for a token, and there is none here; give ")


def test_what_the_cluster_can_never_give_is_refused_at_once(cluster: Cluster, client: Client) -> None:
    told = raytorch(cluster, "submit", str(QUICKSTART), "--workers", "3")
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr == (
        "3 workers with 1 CPU each need 3 CPUs, but the cluster has 2; "
        "lower scaling.workers or scaling.cpus_per_worker, or add nodes\n"
    )
    with pytest.raises(ResourceError, match=r" GPUs, but the cluster has 0; "):
        client.submit(load_config(QUICKSTART, ["scaling.gpus_per_worker=1"]))
    elastic = load_config(QUICKSTART, ["scaling.workers={min: 3, max: 4}"])
    with pytest.raises(ResourceError, match="3 workers"):
        client.submit(elastic)


def test_mistakes_are_refused_before_anything_is_sent(
    cluster: Cluster, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(client.jobs())
    told = raytorch(cluster, "submit", str(QUICKSTART), "--set", "epochs=0")
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr.startswith("override epochs=0: epochs: must be a whole number of at least 1")
    with pytest.raises(RunExistsError, match=r"runs/first exists already; take another name"):
        client.submit(load_config(QUICKSTART), name="first")
    with pytest.raises(RunExistsError, match=r"has a job first already"):
        client.submit(load_config(QUICKSTART, ["storage=/nowhere/at/all"]), name="first")
    with pytest.raises(UserError, match=r"env NOT_SET_HERE: not set here"):
        client.submit(load_config(QUICKSTART), env=["NOT_SET_HERE"])
    with pytest.raises(UserError, match=r"nothing\.py: no such file"):
        client.submit_script("nothing.py")
    monkeypatch.setattr("raytorch.service.destination.run_here", lambda nodes: False)
    with pytest.raises(UserError, match=r"^storage: runs is a folder of this machine, and the cluster at .* elsewhere"):
        client.submit(load_config(QUICKSTART))
    with pytest.raises(UserError, match=r"^run: runs/endless is a folder of this machine"):
        client.resume("runs/endless")
    assert len(client.jobs()) == before


def test_a_project_that_is_too_large_is_refused(client: Client, tmp_path: Path) -> None:
    (tmp_path / "train.py").touch()
    with (tmp_path / "weights.bin").open("wb") as weights:
        for _ in range(101):
            weights.write(os.urandom(1 << 20))
    with pytest.raises(PackageError, match=r"101\.0 MiB in 2 files, .* the 100\.0 MiB .* weights\.bin \(101\.0 MiB\)"):
        client.submit_script(tmp_path / "train.py")


def test_a_job_that_is_not_there(cluster: Cluster, client: Client) -> None:
    for ask in (client.status, client.logs, client.follow, client.stop, client.result, client.wait):
        with pytest.raises(JobNotFoundError, match="no job nothing on http"):
            ask("nothing")
    told = raytorch(cluster, "status", "nothing")
    assert told.returncode == 2
    assert told.stderr == f"no job nothing on {cluster.url} (raytorch jobs)\n"
