"""jobs/prepare_data.py, as its first line says to run it."""

import subprocess
import sys
from pathlib import Path

from data_files import write_mnist

JOB = Path(__file__).resolve().parents[2] / "jobs" / "prepare_data.py"


def test_the_data_of_every_node_is_prepared(tmp_path: Path) -> None:
    root = write_mnist(tmp_path)
    result = subprocess.run(
        [sys.executable, str(JOB), "mnist", str(root)], capture_output=True, text=True, check=False, timeout=120
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.endswith(f"  {root}  7 + 3 images\n")
    assert result.stdout.count("\n") == 1
