"""What the commands share: where they print, their exit statuses, and the options that several of them take."""

from typing import Annotated

import typer
from rich.console import Console

EXIT_FAILED, EXIT_INPUT, EXIT_STOPPED = 1, 2, 130

errors = Console(stderr=True, highlight=False)
output = Console(highlight=False)

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="K=V", help="Change a key of the file, e.g. optimizer.lr=0.01.")
]
Workers = Annotated[int | None, typer.Option(min=1, help="Workers, in place of scaling.workers.")]
Name = Annotated[str | None, typer.Option(help="Name of the run and its folder.")]
Storage = Annotated[str, typer.Option(help="Folder or URI that holds the runs.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


def new_app() -> typer.Typer:
    """A group of commands in the one style that all of them have."""
    return typer.Typer(
        no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
    )
