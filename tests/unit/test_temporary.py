"""Temporary folders: of processes that go on they stay, those of killed ones go."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from raytorch.system import temporary_folders
from raytorch.system.processes import Process
from raytorch.system.temporary_folders import delete_abandoned, make_temporary, note_ray_session, temporary_folder

SESSION = "session_2026-11-22_21-39-27_677000_4711"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder of the system's for this test alone."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    delete_abandoned.cache_clear()
    return tmp_path


def killed(place: Path, code: str) -> Path:
    """What a process prints as the path of its folder before it is killed."""
    imports = "import os\nfrom raytorch.system.temporary_folders import *"
    source = f"{imports}\nprint({code}, flush=True)\nos.kill(os.getpid(), 9)"
    environment = os.environ | {"TMPDIR": str(place)}
    ended = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True)
    assert ended.returncode == -9, ended.stderr
    return Path(ended.stdout.strip())


def test_a_folder_goes_with_its_block_and_is_its_owners_alone() -> None:
    with temporary_folder() as folder:
        assert folder.stat().st_mode & 0o077 == folder.parent.stat().st_mode & 0o077 == 0
        (folder / "file").touch()
    assert not folder.exists()


def test_the_folder_of_a_killed_process_goes_with_the_next_start(place: Path) -> None:
    left = killed(place, "make_temporary()")
    assert left.exists()
    with temporary_folder() as mine:
        assert not left.exists()
        delete_abandoned.cache_clear()
        delete_abandoned()
        assert mine.exists()


def test_the_folder_of_a_process_that_goes_on_stays(place: Path) -> None:
    code = "from raytorch.system.temporary_folders import make_temporary; print(make_temporary(), flush=True); input()"
    command, pipe = [sys.executable, "-c", code], subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, text=True, env=os.environ | {"TMPDIR": str(place)}
    ) as other:
        assert other.stdout
        theirs = Path(other.stdout.readline().strip())
        delete_abandoned()
        assert theirs.exists()
        other.communicate("\n")


@pytest.mark.skipif(Process.current().boot is None, reason="this system does not tell its starts apart")
def test_what_was_there_before_the_machine_was_started_anew_goes() -> None:
    mine = make_temporary()
    pid, began, *_ = mine.name.split("-")
    before = mine.with_name(f"{pid}-{began}-00000000-0000-0000-0000-000000000000-4026531836-0a1b2c3d")
    mine.rename(before)
    delete_abandoned.cache_clear()
    delete_abandoned()
    assert not before.exists()


def test_what_is_none_of_ours_stays(place: Path) -> None:
    mine = make_temporary()
    for name in ("notes", "1-2-0a1b-3-short"):
        mine.with_name(name).mkdir()
    delete_abandoned.cache_clear()
    delete_abandoned()
    assert mine.with_name("notes").exists()
    assert mine.with_name("1-2-0a1b-3-short").exists()


@pytest.mark.parametrize(("name", "goes"), [(SESSION, True), ("precious", False)])
def test_the_session_of_a_ray_goes_when_who_started_it_is_gone(place: Path, name: str, goes: bool) -> None:
    session = place / "ray" / name
    session.mkdir(parents=True)
    (session / "raylet.out").touch()
    note_ray_session(str(session))
    delete_abandoned()
    assert session.exists()  # this process goes on
    killed(place, f"note_ray_session({str(session)!r})")
    delete_abandoned.cache_clear()
    delete_abandoned()
    assert session.exists() is not goes


NAMED = """
import ctypes, sys, time
ctypes.CDLL(None).prctl(15, sys.argv[1].encode())  # PR_SET_NAME
log = open(sys.argv[2], "w")
print("on", flush=True)
time.sleep(600)
"""
"""A process under a name of its own that writes to a log."""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which files a process keeps open")
@pytest.mark.parametrize(
    ("name", "log", "ends"),
    [
        ("ray::DashboardAgent", "session_2026-11-22_21-39-27_677000_4711/agent.log", True),
        ("ray::DashboardAgent", "session_2026-11-22_21-39-27_677000_4712/agent.log", False),
        ("less", "session_2026-11-22_21-39-27_677000_4711/agent.log", False),
    ],
)
def test_what_a_killed_clients_ray_has_left_running_is_ended(place: Path, name: str, log: str, ends: bool) -> None:
    (place / log).parent.mkdir()
    with subprocess.Popen([sys.executable, "-c", NAMED, name, str(place / log)], stdout=subprocess.PIPE) as left:
        assert left.stdout
        left.stdout.readline()
        try:
            killed(place, f"note_ray_session({str(place / SESSION)!r})")
            delete_abandoned()
            if ends:
                left.wait(20)
            assert left.poll() == (-9 if ends else None)
        finally:
            left.kill()
    assert not (place / SESSION).exists()


def test_a_folder_that_somebody_else_has_made_is_not_used(place: Path) -> None:
    (place / "elsewhere").mkdir()
    (place / f"raytorch-{os.getuid()}").symlink_to(place / "elsewhere")
    with pytest.raises(PermissionError, match="not a folder of this user's"):
        temporary_folders.make_temporary()
