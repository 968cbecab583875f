"""Joining a Ray: asked while another thread still imports it, and where none can start."""

import os
import subprocess
import sys
from pathlib import Path

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


def test_a_ray_that_cannot_start_is_told_with_the_reason(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 30)  # more than the path of a socket may have
    folder.mkdir()
    code = "from raytorch.cluster.joining import joined_ray\nwith joined_ray(): pass"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"TMPDIR": str(folder)}
    )
    *_, told = result.stderr.splitlines()
    assert "ClusterError: no Ray starts on this machine: validate_socket_filename failed: AF_UNIX path length" in told
    assert result.returncode == 1
