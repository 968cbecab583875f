"""Scripts run as a cluster runs them that were submitted, and the record that is left."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raytorch.runs.catalog import read_summary
from raytorch.runs.storage import RunFolder


def start(
    tmp_path: Path,
    source: str,
    *arguments: str,
    environment: dict[str, str] | None = None,
    module: Sequence[str] = ("-m", "raytorch.service.script"),
    **options: Any,
) -> subprocess.Popen[str]:
    (tmp_path / "job.py").write_text(source, encoding="utf-8")
    command = [
        sys.executable,
        "-u",
        *module,
        f"{tmp_path}/runs/mine",
        "--",
        "job.py",
        *arguments,
    ]
    return subprocess.Popen(
        command,
        cwd=tmp_path,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"} | (environment or {}),
        **({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options),
    )


def summary(tmp_path: Path) -> dict[str, Any]:
    return read_summary(RunFolder(f"{tmp_path}/runs", "mine"))
