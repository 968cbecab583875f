"""Shared parts of the commands: where they print, their exit statuses, and the options that several of them take."""

import shlex
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from raytorch.errors import RaytorchError, Remedy, UserError
from raytorch.system.safe_text import without_secrets
from raytorch.system.strict_json import to_json

EXIT_FAILED, EXIT_INPUT, EXIT_STOPPED = 1, 2, 130

errors = Console(stderr=True, highlight=False)
output = Console(highlight=False)
progress = Console(stderr=True, highlight=False)
"""News while a command is at work, which ``raytorch -q`` leaves out."""

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="K=V", help="Change a key of the file, e.g. optimizer.lr=0.01.")
]
Workers = Annotated[int | None, typer.Option(min=1, help="Workers, in place of scaling.workers.")]
Name = Annotated[str | None, typer.Option(help="Name of the run and its folder.")]
ChangedCode = Annotated[
    bool, typer.Option("--changed-code", help="Go on with code of your own that has changed since the last checkpoint.")
]
Storage = Annotated[str, typer.Option(help="Folder or URI that holds the runs.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


def new_app() -> typer.Typer:
    """A group of commands in the one style that all of them have."""
    return typer.Typer(
        no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
    )


def print_json(content: Any) -> None:
    """Print what ``--json`` asks for, on standard output."""
    print(without_secrets(to_json(content, default=datetime.isoformat)), flush=True)  # noqa: T201


def worded(error: RaytorchError) -> str:
    """An error as the command line tells it: with what its remedies are called here."""
    text = str(error)
    if not error.remedies:
        return text
    remedies = " or ".join(map(_remedy, error.remedies))
    return f"{text}\ntry: {remedies}" if "\n" in text else f"{text} ({remedies})"


def _remedy(remedy: Remedy) -> str:
    from raytorch.runs.storage import from_here, is_in_job

    resumed = "sweep" if remedy.of == "sweep" else "submit" if remedy.of == "job" or is_in_job() else "train"
    calls = {
        "resume": f"raytorch {resumed} --resume",
        "list_runs": "raytorch runs --storage",
        "jobs": "raytorch jobs",
        "follow": "raytorch logs -f",
        "prepare": f"raytorch data prepare {remedy.of} --root",
    }
    call = calls.get(remedy.name, f"--{remedy.name.replace('_', '-')}")
    return f"{call} {shlex.quote(from_here(remedy.value))}" if remedy.value else call


def config_from_options(
    file: Path | None,
    overrides: list[str] | None,
    workers: int | None,
    name: str | None,
    resume: str | None,
    storage: str = "runs",
) -> Any:
    """The configuration that the command line describes; None for a run that is resumed with its own."""
    from raytorch.config.file import with_own_code
    from raytorch.runs.catalog import find_run
    from raytorch.runs.plan import recorded_config
    from raytorch.training.api import load

    changes = [*(overrides or []), *([f"scaling.workers={workers}"] if workers else [])]
    if resume and name is not None:
        raise UserError("--name does not go with --resume: a resumed run keeps its name")
    if file is not None:
        return load(file, changes)
    if not resume:
        raise UserError("give a configuration file, e.g. configs/quickstart.yaml, or --resume RUN")
    return with_own_code(recorded_config(find_run(resume, storage)), changes) if changes else None
