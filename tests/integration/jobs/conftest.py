"""One cluster of a head without CPUs and two nodes of one CPU each for all tests here, which build on one another."""

from collections.abc import Iterator

import pytest
from job_cluster import QUICKSTART, SECRET, Cluster, raytorch_of_its_own, running_cluster

from raytorch import Client


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("API_KEY", SECRET)
        with running_cluster(tmp_path_factory.mktemp("home"), environment) as there:
            yield there


@pytest.fixture(scope="package")
def client(cluster: Cluster) -> Client:
    return Client(cluster.url)


@pytest.fixture(scope="package")
def first(cluster: Cluster) -> str:
    """The quickstart, sent by the command line while nothing else runs."""
    sent = raytorch_of_its_own(
        cluster, "submit", str(QUICKSTART), "--set", "epochs=3", "--name", "first", "--env", "API_KEY"
    )
    assert (sent.returncode, sent.stderr) == (0, "")
    assert sent.stdout.splitlines() == [
        "job        first",
        f"dashboard  {cluster.url}/#/jobs/first",
        f"run        {cluster.home}/runs/first",
        "follow     raytorch logs -f first",
        "state      raytorch status first",
        "result     raytorch result first",
        "stop       raytorch stop first",
    ]
    return "first"
