"""Parts of Ray that nothing can do without are killed: whoever needs it is told which, and nothing stays behind."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from commands import command, is_alive, kill_part, wait_until

from raytorch.runs.catalog import read_summary
from raytorch.runs.checkpoint_manifest import latest_checkpoint
from raytorch.runs.plan import plan_resume
from raytorch.runs.storage import RunFolder
from raytorch.sweeps.sweep import plan_resumed_sweep

HEAD = "Ray's head process (gcs_server) died, killed or crashed"
RAYLET = "the raylet of the driver's machine died, killed or crashed, and with it all of Ray there"
GOES_ON = (
    "a part of Ray was lost, killed or crashed, for want of memory, say; resume goes on from the latest checkpoint"
)


def test_a_part_of_ray_that_is_killed_is_the_cause_that_the_run_ends_with(small_config: Path, tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "runs"), "endless")
    options = ["--set", "epochs=100000", "--set", "scaling.workers=1", "--name", "endless"]
    with command(str(small_config), *options) as running:
        wait_until(lambda: folder.exists() and latest_checkpoint(folder) is not None, running)
        processes = kill_part(running.pid, "gcs_server")
        output, errors = running.communicate(timeout=120)
    said = errors.decode()
    assert running.returncode == 1, said
    assert output == b""
    assert f"{HEAD}\n" in said
    assert GOES_ON in said
    assert said.endswith(f"\ntry: raytorch train --resume {folder}\n")
    assert "Traceback" not in said
    assert [line for line in said.splitlines() if "(raylet)" in line] == []
    summary = read_summary(folder)
    assert (summary["state"], summary["error"]["cause"], summary["error"]["message"]) == ("failed", "lost_ray", HEAD)
    wait_until(lambda: not any(map(is_alive, processes)))
    assert plan_resume(folder.path).folder.path == folder.path  # nothing is in its way


def test_a_sweep_that_loses_a_part_of_ray_keeps_what_is_finished_and_can_go_on(
    small_run: dict[str, Any], tmp_path: Path
) -> None:
    storage = small_run.pop("storage")
    run = small_run | {"scaling": {"workers": 1}}
    sweep = {"name": "s", "run": run, "parameters": {"epochs": {"grid": [1, 100_000]}}, "storage": storage}
    file, folder = tmp_path / "sweep.yaml", RunFolder(storage, "s")
    file.write_text(yaml.safe_dump(sweep | {"concurrency": 1}), encoding="utf-8")
    endless = RunFolder(str(folder), "trial-001")
    with command(str(file), "--name", "s", name="sweep") as running:
        wait_until(lambda: endless.exists() and latest_checkpoint(endless) is not None, running)
        processes = kill_part(running.pid, "raylet")
        output, errors = running.communicate(timeout=120)
    said = errors.decode()
    assert running.returncode == 1, said
    assert output == b""
    assert f"{RAYLET}\n" in said
    assert said.endswith(f"\ntry: raytorch sweep --resume {folder}\n")
    assert "Traceback" not in said
    record = json.loads(folder.read_bytes("sweep.json"))
    assert (record["state"], record["error"]["cause"], record["error"]["message"]) == ("failed", "lost_ray", RAYLET)
    wait_until(lambda: not any(map(is_alive, processes)))
    assert [result.is_over for result in plan_resumed_sweep(str(folder)).results({})] == [True, False]


SESSION = """
import sys, time
import raytorch
from raytorch.errors import SessionLostError

session = raytorch.connect(workers=1)
tensor = session.ones(1)
tensor.item()
print("ready", flush=True)
try:
    session.run(time.sleep, 1000)
except SessionLostError as lost:
    print(lost, flush=True)
for use in (tensor.item, lambda: session.ones(2), session.handles, session.stats):
    try:
        use()
    except SessionLostError as lost:
        print(lost, flush=True)
with raytorch.connect(workers=1) as another:  # at once
    session.close()
    print(another.ones(1).item())
"""


def test_a_process_whose_session_loses_ray_is_told_and_can_connect_again() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SESSION], start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as client:
        try:
            assert client.stdout
            assert client.stdout.readline() == b"ready\n"
            processes = kill_part(client.pid, "raylet")
            output, errors = client.communicate(timeout=170)
        finally:
            client.kill()
    assert errors.decode() == ""
    assert output.decode().splitlines() == [f"the session is lost: {RAYLET}; connect again"] * 5 + ["1.0"]
    assert client.returncode == 0
    wait_until(lambda: not any(map(is_alive, processes)))
