"""Parts of Ray that a run cannot do without are killed; the run says which, leaves nothing behind, and can go on."""

from pathlib import Path

import pytest
from commands import command, is_alive, wait_until, with_its_children

from raytorch.runs import latest_checkpoint, plan_resume, read_summary
from raytorch.storage import RunFolder

GOES_ON = "a part of Ray was lost, killed or crashed, for want of memory, say; raytorch train --resume goes on"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("ray::RunMonitor", "the run's monitor died, killed or crashed"),
        ("ray::WorkerGroup", "the run's controller died, killed or crashed"),
        ("raylet", "the raylet of the driver's machine died, killed or crashed, and with it all of Ray there"),
    ],
)
def test_a_part_of_ray_that_is_killed_is_the_cause_that_the_run_ends_with(
    small_config: Path, tmp_path: Path, name: str, told: str
) -> None:
    folder = RunFolder(str(tmp_path / "runs"), "endless")
    options = ["--set", "epochs=100000", "--set", "scaling.workers=1", "--name", "endless"]
    with command(str(small_config), *options) as running:
        wait_until(lambda: folder.exists() and latest_checkpoint(folder) is not None, running)
        processes = with_its_children(running.pid)
        (part,) = [process for process in processes if process.name().startswith(name)]
        part.kill()
        output, errors = running.communicate(timeout=120)
    said = errors.decode()
    assert running.returncode == 1, said
    assert output == b""
    assert f"{told}\n" in said
    assert GOES_ON in said
    assert "Traceback" not in said
    assert [line for line in said.splitlines() if "(raylet)" in line] == []
    summary = read_summary(folder)
    assert (summary["state"], summary["error"]["cause"], summary["error"]["message"]) == ("failed", "lost_ray", told)
    wait_until(lambda: not any(is_alive(process) for process in processes))
    assert plan_resume(folder.path).folder.path == folder.path  # nothing is in its way
