"""Whether a process has joined a Ray, asked while another thread still imports it."""

import subprocess
import sys

SLOW_RAY = """
import time
time.sleep(0.2)  # half-imported: the module is there, its functions are not
def is_initialized():
    return True
"""


def test_a_ray_that_is_being_imported_is_waited_for(tmp_path):
    (tmp_path / "ray.py").write_text(SLOW_RAY)
    code = f"""
import sys, threading
sys.path.insert(0, {str(tmp_path)!r})
from raytorch.cluster import prepare_ray
importing = threading.Thread(target=__import__, args=["ray"])
importing.start()
while "ray" not in sys.modules:
    pass
assert not hasattr(sys.modules["ray"], "is_initialized")
print(prepare_ray(None))
importing.join()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"
