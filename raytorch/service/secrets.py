"""Secrets of a job: on their way from the submitter's environment into that of the job's processes.

What a job's runtime environment says is shown to all who may list jobs, so the values travel as a package of their own.
Ray unpacks it on the nodes beside the code; its name is a digest, which a random number in it keeps from being guessed.
On a node the file is its owner's alone. Imports neither torch nor ray.
"""

import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from secrets import token_hex

from raytorch.errors import UserError

MARK = "RAYTORCH_JOB_SECRETS"
"""Environment variable of a job that has secrets; its value says only that."""
FOLDER = "raytorch_job_secrets"
FILE = "environment.json"
HOOK = "raytorch.service.secrets.load_secrets"
"""Function that Ray calls in each worker process of the job."""


def collect_secrets(keys: Iterable[str]) -> dict[str, str]:
    """The values of environment variables of this process. Raises UserError if one is not set, or is none."""
    values = {}
    for key in keys:
        if "=" in key:
            name = key.partition("=")[0]
            raise UserError(
                f"env {name}=...: give the name alone, and the value in the environment, where neither the shell's "
                f"history nor a list of processes shows it: export {name}"
            )
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
            raise UserError(f"env {key}: not a name of an environment variable")
        if key not in os.environ:
            raise UserError(f"env {key}: not set here; export {key} first")
        values[key] = os.environ[key]
    return values


def write_secrets(values: Mapping[str, str], folder: Path) -> Path:
    """Write the package into ``folder``; returns the path of what Ray is to send as a Python module."""
    package = folder / FOLDER
    package.mkdir(mode=0o700)
    file = package / FILE
    file.touch(mode=0o600)
    file.write_text(json.dumps({"salt": token_hex(32), "values": dict(values)}), encoding="utf-8")
    return package


def load_secrets() -> None:
    """Put the job's secrets into the environment of this process, if it has any."""
    if MARK not in os.environ:
        return
    for path in sys.path:
        file = Path(path) / FOLDER / FILE
        if file.exists():
            file.chmod(0o600)
            os.environ.update(json.loads(file.read_text(encoding="utf-8"))["values"])
            return
    raise UserError(f"the secrets of this job are not on this node: no {FOLDER}/{FILE} on the Python path")
