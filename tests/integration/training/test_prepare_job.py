"""jobs/prepare_data.py, on the nodes of a Ray that runs."""

import runpy
import sys
from pathlib import Path

import pytest
from data_files import write_mnist

JOB = Path(__file__).resolve().parents[3] / "jobs" / "prepare_data.py"


@pytest.mark.usefixtures("local_ray")
def test_the_data_of_every_node_is_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_mnist(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(JOB), "mnist", str(root)])
    runpy.run_path(str(JOB), run_name="__main__")
    told = capsys.readouterr().out
    assert told.endswith(f"  {root}  7 + 3 images\n")
    assert told.count("\n") == 1
