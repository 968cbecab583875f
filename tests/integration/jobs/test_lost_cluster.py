"""The runs of a cluster that is gone; this comes last, as it shuts the cluster down."""

import json

import pytest
from job_cluster import JOBS, Cluster, raytorch, raytorch_of_its_own

from raytorch import Client
from raytorch.errors import (
    ClusterError,
)
from raytorch.runs.catalog import list_runs
from raytorch.runs.storage import RunFolder


def test_after_the_cluster_its_runs_still_tell_all(cluster: Cluster, client: Client) -> None:
    cluster.shut_down()
    told = raytorch_of_its_own(cluster, "runs", "--json")
    assert (told.returncode, told.stderr) == (0, "")
    states = {summary["name"]: summary["state"] for summary in json.loads(told.stdout)}
    assert len(states) == 7 + JOBS
    named = {name: states[name] for name in ("first", "script", "endless", "broken")}
    assert named == {"first": "finished", "script": "finished", "endless": "stopped", "broken": "failed"}
    assert {summary["name"]: summary["state"] for summary in list_runs(f"{cluster.home}/runs")} == states
    assert RunFolder(f"{cluster.home}/runs", "first").read_bytes("logs/rank-0.log").decode()
    assert raytorch(cluster, "report", "first").returncode == 0
    with pytest.raises(ClusterError, match="no longer answers"):
        client.jobs()
    assert raytorch(cluster, "jobs").stderr.startswith(f"no Ray cluster answers at {cluster.url} ")
