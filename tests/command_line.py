"""The command line in the process of a test, from its entry point to its exit."""

import contextlib
import io
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from raytorch.cli.main import main


@contextlib.contextmanager
def log_level_kept() -> Iterator[None]:
    """Log as before, when a command that was told how much to log has ended."""
    logger = logging.getLogger("raytorch")
    level = logger.level
    yield
    logger.setLevel(level)


def raytorch(folder: Path, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run the command in ``folder``, so that its runs go there, on the Ray that this process has joined, if any."""
    command = ["raytorch", *map(str, arguments)]
    output, told = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(folder),
        log_level_kept(),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(told),
        patch.object(sys, "argv", command),
        pytest.raises(SystemExit) as end,
    ):
        main()
    return subprocess.CompletedProcess(command, int(end.value.code or 0), output.getvalue(), told.getvalue())
