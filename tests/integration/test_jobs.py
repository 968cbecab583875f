"""Jobs on a cluster of a head without CPUs and two nodes of one CPU each: sent, followed, stopped, and told of later.

The tests share the cluster and build on one another; the last one shuts it down.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from job_cluster import BIN, TESTS, Cluster, raytorch, running_cluster, wait_until
from job_scripts import FAILING_STEP, ODD_SCRIPT, RAY_TRAIN_SCRIPT, SQUARE_SCRIPT, STORING_SCRIPT

from raytorch import Client
from raytorch.config.file import load_config
from raytorch.errors import (
    ClusterError,
    JobNotFoundError,
    PackageError,
    Remedy,
    ResourceError,
    RunExistsError,
    RunNotFoundError,
    UserError,
)
from raytorch.runs.catalog import list_runs
from raytorch.runs.checkpoint_manifest import latest_checkpoint
from raytorch.runs.storage import RunFolder
from raytorch.service import client as client_module
from raytorch.service.job import failure_told

QUICKSTART = TESTS.parent / "configs" / "quickstart.yaml"
SECRET = "f4fb3fcf-a-secret"
JOBS = int(os.environ.get("RAYTORCH_TEST_JOBS", "4"))
"""Jobs that are sent at once; the suite is content with few."""
TINY = ["model=mlp", "epochs=1", "scaling.workers=1", "batch_size=256", "logging.tensorboard=false"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("API_KEY", SECRET)
        with running_cluster(tmp_path_factory.mktemp("home"), environment) as there:
            yield there


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Client:
    return Client(cluster.url)


@pytest.fixture(scope="module")
def first(cluster: Cluster) -> str:
    """The quickstart, sent by the command line while nothing else runs."""
    sent = raytorch(cluster, "submit", str(QUICKSTART), "--set", "epochs=3", "--name", "first", "--env", "API_KEY")
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


def test_the_quickstart_is_followed_to_its_result(cluster: Cluster, client: Client, first: str) -> None:
    with pytest.raises(UserError, match="follow it to its end") as refusal:
        client.result(first)
    assert refusal.value.remedies == (Remedy("follow", "first"),)
    log = "".join(client.follow(first))
    assert "epoch 3  step 72  test accuracy" in log
    assert log == client.logs(first)
    job = client.wait(first)
    assert (job.state, job.kind, job.name, job.failure) == ("finished", "train", "first", None)
    assert job.submitted is not None
    assert job.started is not None
    assert job.ended is not None
    assert job.submitted.replace(microsecond=0) <= job.started <= job.ended
    told = raytorch(cluster, "result", "first", "--json")
    assert (told.returncode, told.stderr) == (0, "")
    summary = json.loads(told.stdout)
    assert summary == client.result(first)
    assert summary["metrics"]["accuracy"] > 0.8
    assert [summary["path"], summary["state"]] == [f"{cluster.home}/runs/first", "finished"]
    assert "epoch 3.00 step 72" in client.logs(first, rank=1)
    with pytest.raises(RunNotFoundError, match=r"logs/rank-7\.log does not exist"):
        client.logs(first, rank=7)


def test_a_ray_train_script_runs_unchanged_with_its_project_and_its_secret(cluster: Cluster, client: Client) -> None:
    project = cluster.home / "project"
    project.mkdir()
    (project / "train.py").write_text(RAY_TRAIN_SCRIPT, encoding="utf-8")
    (project / "settings.py").write_text("STEPS = 3\n", encoding="utf-8")
    job = client.submit_script(project / "train.py", [str(project), "a b"], name="script", env=["API_KEY"])
    assert job.kind == "script"
    job = client.wait("script")
    log = client.logs("script")
    assert job.state == "finished", log
    assert f"arguments ['{project}', 'a b'] key {len(SECRET)}" in log
    for rank in range(2):
        assert (project / f"rank-{rank}").read_text(encoding="utf-8") == f"2 workers, key {len(SECRET)}"
    record = client.result("script")
    assert (record["exit_status"], record["command"]) == (0, f"python project/train.py {project} 'a b'")
    assert (cluster.home / "runs" / "script" / "logs" / "driver.log").read_text(encoding="utf-8") in log


def test_a_run_that_is_stopped_saves_a_last_checkpoint(cluster: Cluster, client: Client) -> None:
    # A small checkpoint seldom, so that the last one is made by the stop.
    endless = ["epochs=100000", "model=mlp", "scaling.workers=1"]
    config = load_config(QUICKSTART, [*endless, "checkpoint={every_steps: 20, every_epochs: null}"])
    job = client.submit(config, name="endless")
    folder = job.folder
    assert folder is not None
    wait_until(lambda: folder.exists() and latest_checkpoint(folder), "a checkpoint")
    assert client.stop("endless")
    job = client.wait("endless")
    assert job.state == "stopped"
    assert job.failure is not None
    assert job.failure.cause == "stop"
    summary = client.result("endless")
    assert summary["state"] == "stopped"
    assert latest_checkpoint(folder) == f"checkpoint_{summary['step']:08d}"
    assert not client.stop("endless")
    assert raytorch(cluster, "result", "endless").returncode == 130


def test_a_script_that_fails_says_why(cluster: Cluster, client: Client) -> None:
    (cluster.home / "project" / "broken.py").write_bytes(b"def f():\n    raise LookupError('not there')\nf()\n")
    sent = raytorch(cluster, "submit", "project/broken.py", "--name", "broken", "--wait")
    assert sent.returncode == 1
    assert "LookupError: not there" in sent.stdout
    failure = client.status("broken").failure
    assert failure is not None
    assert (failure.cause, failure.message) == ("error", "not there")
    assert failure.traceback is not None
    assert failure.traceback.startswith('Traceback (most recent call last):\n  File "project/broken.py", line 3')
    assert client.result("broken")["state"] == "failed"
    told = raytorch(cluster, "status", "broken")
    assert told.stdout.endswith(f"\n{failure.traceback}\n")
    assert "cause      error\nmessage    not there\n" in told.stdout


def test_any_output_of_a_script_is_followed_to_its_own_exit_status(cluster: Cluster) -> None:
    below = cluster.home / "project" / "below"
    below.mkdir(parents=True)
    (below.parent / "odd.py").write_text(ODD_SCRIPT, encoding="utf-8")
    (below.parent / "notes.txt").symlink_to("/etc/hostname")
    sent = raytorch(
        cluster, "submit", "../odd.py", "--storage", f"{cluster.home}/runs", "--name", "odd", "--wait", at=below
    )
    assert sent.returncode == 3
    assert f"\n{'x' * 5_000_000}\ncaf\ufffd\u2028end\nthe last words" in sent.stdout
    assert "notes.txt (leads out of the project, to /etc/hostname)" in sent.stderr
    told = raytorch(cluster, "logs", "odd", "--json")
    lines = [json.loads(line)["line"] for line in told.stdout.splitlines()]
    assert lines[-3:] == ["x" * 5_000_000, "caf\ufffd\u2028end", "the last words"]


def test_a_training_that_fails_names_the_first_rank_and_shows_its_traceback(
    cluster: Cluster, client: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    changed = cluster.home / "changed" / "raytorch"
    shutil.copytree(client_module.raytorch.__path__[0], changed, ignore=shutil.ignore_patterns("__pycache__"))
    with (changed / "training" / "loop.py").open("a") as training:
        training.write(FAILING_STEP)
    with monkeypatch.context() as here:
        here.setattr(client_module.raytorch, "__path__", [str(changed)])
        client.submit(load_config(QUICKSTART, ["model=mlp", "failure.max_restarts=3"]), name="failing")
    log = "".join(client.follow("failing", rank=1))
    waiting = (
        f"waiting for the log of rank 1: {cluster.home}/runs/failing cannot be read from here, or the run has not "
    )
    assert [message[: len(waiting)] for message in caplog.messages] == [waiting]

    job = client.wait("failing")
    failure = job.failure
    assert failure is not None
    assert (job.state, failure.cause, failure.kind, failure.rank) == ("failed", "error", "ArithmeticError", 1)
    assert failure.message == "the user's own mistake"
    assert failure.traceback is not None
    assert failure.traceback.startswith("Traceback (most recent call last):\n")
    assert ", in fail_on_rank_1\n" in failure.traceback
    assert f"rank 1 failed\n{failure.traceback}" in log
    driver = client.logs("failing")
    assert f"rank 1 failed\n{failure.traceback}\nlogs: {cluster.home}/runs/failing/logs" in driver
    assert failure_told(driver) == failure  # what status says where the run's folder cannot be read
    told = raytorch(cluster, "status", "failing")
    assert told.returncode == 0
    assert told.stdout.endswith(f"cause      error\nmessage    rank 1: {failure.message}\n\n{failure.traceback}\n")
    assert json.loads(raytorch(cluster, "status", "failing", "--json").stdout)["failure"] == asdict(failure)

    came_to = raytorch(cluster, "result", "failing")
    assert (came_to.returncode, came_to.stdout, came_to.stderr) == (1, told.stdout, "")
    summary = client.result("failing")
    assert (summary["state"], summary["restarts"], summary["error"]) == ("failed", 0, asdict(failure))


def test_a_relative_storage_of_a_script_is_in_that_of_its_record(cluster: Cluster, client: Client) -> None:
    script = cluster.home / "project" / "store.py"
    script.write_text(STORING_SCRIPT, encoding="utf-8")
    job = client.wait(client.submit_script(script, storage="records/of/scripts").id)
    assert job.state == "finished", client.logs(job.id)
    records = cluster.home / "records" / "of" / "scripts"
    assert (records / "runs" / "kept" / "note").read_text(encoding="utf-8") == f"{records}/runs/kept"
    assert (records / job.name / "summary.json").exists()


def test_many_jobs_at_once_on_two_cpus_all_end(cluster: Cluster, client: Client) -> None:
    config = load_config(QUICKSTART, TINY)
    script = cluster.home / "project" / "square.py"
    script.write_text(SQUARE_SCRIPT, encoding="utf-8")
    # Most are scripts, which start sooner.
    ids = [client.submit(config).id if n % 4 == 0 else client.submit_script(script, [str(n)]).id for n in range(JOBS)]
    assert len(set(ids)) == JOBS
    jobs = [client.wait(job) for job in ids]
    assert {job.state for job in jobs} == {"finished"}, [job.failure for job in jobs if job.failure]
    assert len({job.run for job in jobs}) == JOBS
    assert len({job.digest for job in jobs}) == 2
    for number, job in enumerate(jobs):
        summary = client.result(job.id)
        assert (summary["name"], summary["state"]) == (job.id, "finished")
        if job.kind == "train":
            assert summary["epochs"] == 1
        else:
            assert f"\nthe square is {number**2}\n" in client.logs(job.id)
    assert set(ids) <= {job.id for job in client.jobs()}


def test_a_run_is_resumed_and_the_log_of_one_rank_followed(cluster: Cluster, client: Client, first: str) -> None:
    job = client.resume("runs/first", load_config(QUICKSTART, ["epochs=4"]))
    log = "".join(client.follow(job.id, rank=1))
    assert "epoch 3.00 step 72" in log
    assert "epoch 4.00 step 96" in log
    assert log == client.logs(job.id, rank=1)
    assert client.wait(job.id).state == "finished"
    summary = client.result(job.id)
    assert (summary["name"], summary["epochs"], summary["step"]) == ("first", 4, 96)


def test_rays_own_client_shows_the_same_jobs(cluster: Cluster, client: Client) -> None:
    listed = subprocess.run(
        [str(BIN / "ray"), "job", "list", "--address", cluster.url],
        capture_output=True,
        encoding="utf-8",
        check=True,
        env=os.environ | {"RAY_AUTH_MODE": "token"},
    )
    jobs = client.jobs()
    assert [job.id for job in jobs][:4] == ["first", "script", "endless", "broken"]
    assert all(f"submission_id='{job.id}'" in listed.stdout + listed.stderr for job in jobs)
    told = raytorch(cluster, "jobs", "--json")
    assert [job["id"] for job in json.loads(told.stdout)] == [job.id for job in jobs]
    assert told.stderr == ""


def test_secrets_are_in_no_log_and_no_record(cluster: Cluster, client: Client) -> None:
    logs = [file for file in cluster.temp.glob("**/session_*/logs/**/*") if file.is_file()]
    records = [file for file in (cluster.home / "runs").rglob("*") if file.is_file()]
    assert len(logs) > 20
    assert [file for file in [*logs, *records] if SECRET.encode() in file.read_bytes()] == []
    for job in client.jobs():
        assert SECRET not in str(client._details(job.id))
    packages = list(cluster.temp.glob("**/session_*/runtime_resources/py_modules_files/*/raytorch_job_secrets/*"))
    assert packages
    assert {file.stat().st_mode & 0o777 for file in packages} == {0o600}


# -- what is refused ---------------------------------------------------------------------------------------------------


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


def test_after_the_cluster_its_runs_still_tell_all(cluster: Cluster, client: Client) -> None:
    cluster.shut_down()
    told = raytorch(cluster, "runs", "--json")
    assert (told.returncode, told.stderr) == (0, "")
    states = {summary["name"]: summary["state"] for summary in json.loads(told.stdout)}
    assert len(states) == 6 + JOBS
    named = {name: states[name] for name in ("first", "script", "endless", "broken")}
    assert named == {"first": "finished", "script": "finished", "endless": "stopped", "broken": "failed"}
    assert {summary["name"]: summary["state"] for summary in list_runs(f"{cluster.home}/runs")} == states
    assert RunFolder(f"{cluster.home}/runs", "first").read_bytes("logs/rank-0.log").decode()
    assert raytorch(cluster, "report", "first").returncode == 0
    with pytest.raises(ClusterError, match="no longer answers"):
        client.jobs()
    assert raytorch(cluster, "jobs").stderr.startswith(f"no Ray cluster answers at {cluster.url} ")
