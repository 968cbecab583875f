"""Jobs on a cluster: sent, followed, stopped and resumed."""

import json
import os
import shutil
import subprocess
from dataclasses import asdict

import pytest
import torch
from job_cluster import BIN, JOBS, QUICKSTART, SECRET, Cluster, raytorch, raytorch_of_its_own, wait_until
from job_scripts import FAILING_STEP, ODD_SCRIPT, OWN_MODEL, RAY_TRAIN_SCRIPT, SQUARE_SCRIPT, STORING_SCRIPT

from raytorch import Client, find_run
from raytorch.config.file import load_config
from raytorch.errors import (
    Remedy,
    RunNotFoundError,
    UserError,
)
from raytorch.runs.checkpoint_manifest import latest_checkpoint
from raytorch.service import client as client_module
from raytorch.service.job import failure_told

TINY = ["model=mlp", "epochs=1", "scaling.workers=1", "batch_size=256", "logging.tensorboard=false"]


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
    sent = raytorch_of_its_own(
        cluster, "submit", "../odd.py", "--storage", f"{cluster.home}/runs", "--name", "odd", "--wait", at=below
    )
    assert sent.returncode == 3
    assert f"\n{'x' * 5_000_000}\ncaf\ufffd\u2028end\nthe last words" in sent.stdout
    assert "notes.txt (leads out of the project, to /etc/hostname)" in sent.stderr
    told = raytorch_of_its_own(cluster, "logs", "odd", "--json")
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


def test_a_run_of_own_code_is_sent_with_its_project(cluster: Cluster, client: Client) -> None:
    project = cluster.home / "own"
    (project / "nets").mkdir(parents=True)
    (project / "nets/net.py").write_text(OWN_MODEL, encoding="utf-8")
    (project / "nets/layers.py").write_text("from torch import nn\n\nLINEAR = nn.Linear\n", encoding="utf-8")
    (project / "width.txt").write_text("16", encoding="utf-8")
    keys = "epochs: 1\nmodel: {name: nets/net.py:Net, bias: false}\nscaling: {workers: 2}\n"
    (project / "run.yaml").write_text(f"{keys}storage: {cluster.home}/runs\n", encoding="utf-8")
    assert raytorch(cluster, "submit", str(project / "run.yaml"), "--name", "own").returncode == 0
    assert client.wait("own").state == "finished", client.logs("own")
    told = raytorch(cluster, "submit", "--resume", "own", "--set", "epochs=2")  # from another folder than the project's
    assert told.returncode == 2
    assert "is of code of your own, which is looked for in the project of the current folder" in told.stderr
    changes = ["--set", "epochs=2", "--set", "scaling.workers=1"]
    again = raytorch(cluster, "submit", "--resume", f"{cluster.home}/runs/own", *changes, at=project)
    assert again.returncode == 0, again.stderr
    job = client.wait(again.stdout.split()[1])
    assert job.state == "finished", client.logs(job.id)
    assert client.result(job.id)["epochs"] == 2
    model = find_run("own", cluster.home / "runs").model(code=project)
    assert model(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    assert [model.first.out_features, model.layer.out_features] == [16, 10]
