"""Joining a Ray: asked while another thread still imports it, and where none can start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from raytorch.cluster.joining import joined_ray
from raytorch.errors import UserError

SLOW_RAY = """
import time
time.sleep(0.2)  # half-imported: the module is there, its functions are not
def is_initialized():
    return True
"""


def test_a_ray_that_is_being_imported_is_waited_for(tmp_path):
    (tmp_path / "ray.py").write_text(SLOW_RAY, encoding="utf-8")
    code = f"""
import sys, threading
sys.path.insert(0, {str(tmp_path)!r})
from raytorch.cluster.joining import starts_ray
importing = threading.Thread(target=__import__, args=["ray"])
importing.start()
while "ray" not in sys.modules:
    pass
assert not hasattr(sys.modules["ray"], "is_initialized")
print(starts_ray(None))
importing.join()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


def test_a_ray_that_cannot_start_is_told_with_the_reason_and_the_remedy(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 30)  # more than the path of a socket may have
    folder.mkdir()
    code = "from raytorch.cluster.joining import joined_ray\nwith joined_ray(): pass"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"TMPDIR": str(folder)}
    )
    *_, told = result.stderr.splitlines()
    assert "ClusterError: no Ray starts on this machine: validate_socket_filename failed: AF_UNIX path length" in told
    assert told.endswith(f"set TMPDIR to a folder of at most 35 characters: {folder} has {len(str(folder))}")
    assert result.returncode == 1


def test_a_current_folder_that_is_gone_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    with pytest.raises(UserError, match=r"^the current folder has been deleted; go to .*"), joined_ray():
        raise AssertionError("a Ray was started")
