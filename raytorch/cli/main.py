"""The ``raytorch`` command. Imports neither torch nor ray before a command needs them.

Exit status: 0 success, 1 the run or the export failed, 2 the input has to change, 130 stopped by Ctrl-C.
"""

import logging
import os
import sys
from io import TextIOWrapper
from typing import Annotated

import typer

from raytorch import __version__
from raytorch.cli import data, jobs, plan, runs, studies, train
from raytorch.cli.common import EXIT_FAILED, EXIT_INPUT, EXIT_STOPPED, errors, new_app, output, progress, worded
from raytorch.errors import RaytorchError, UserError, is_storage_fault
from raytorch.service import secrets
from raytorch.system.processes import interrupting_handlers, set_handlers
from raytorch.system.terminal import say

app = new_app()
for group in (train.app, plan.app, studies.app, runs.app, jobs.app):
    app.add_typer(group)
app.add_typer(data.app, name="data", help="Download, check and show data, and write tokens and indexes of it.")
LEVELS = [logging.WARNING, logging.INFO, logging.DEBUG]


def _print_version(asked: bool) -> None:
    if asked:
        say(output, f"raytorch {__version__}")
        raise typer.Exit


@app.callback()
def choose_what_is_told(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    verbose: Annotated[
        int,
        typer.Option(
            "--verbose",
            "-v",
            count=True,
            show_default=False,
            help="Print raytorch's log; twice: Ray's and the workers'.",
        ),
    ] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress and no warnings.")] = False,
) -> None:
    """Train PyTorch models on Ray."""
    if verbose and quiet:
        raise UserError("-v does not go with -q")
    progress.quiet = quiet
    logger = logging.getLogger("raytorch")
    logger.setLevel(logging.ERROR if quiet else LEVELS[min(verbose, 2)])
    if verbose and not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)


_WATCH = "raytorch.cluster.ray_watch"


def main() -> None:
    """Run the command line."""
    if isinstance(sys.stdout, TextIOWrapper):  # letters that the locale does not have are escaped, as in errors
        sys.stdout.reconfigure(errors="backslashreplace")
    if watch := sys.modules.get(_WATCH):
        watch.lost.clear()  # what was lost before this command
    before = set_handlers(interrupting_handlers())
    try:
        _run()
    except SystemExit as end:
        stores, watch = sys.modules.get("raytorch.runs.remote_folder"), sys.modules.get(_WATCH)
        # The client of a store that does not answer keeps Python from ending, and so does a Ray without its head.
        if (stores and stores.calls_under_way()) or (watch and watch.lost.is_set()):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code if isinstance(end.code, int) else EXIT_FAILED)
        raise
    finally:
        set_handlers(before)


def _run() -> None:
    try:
        secrets.load_secrets()  # this may be the driver of a job
        sys.exit(app(standalone_mode=False) or 0)
    except typer.Exit as end:
        sys.exit(end.exit_code)
    except UserError as error:
        _complain(worded(error), EXIT_INPUT)
    except RaytorchError as error:
        _complain(worded(error), EXIT_FAILED)
    except (KeyboardInterrupt, typer.Abort):
        _complain("stopped", EXIT_STOPPED)
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of the command line itself
            _complain(error.format_message(), EXIT_INPUT)
        if isinstance(error, PermissionError) or is_storage_fault(error):
            _complain(f"{error}; make room or mend the access to it", EXIT_INPUT)
        raise


def _complain(message: str, status: int) -> None:
    say(errors, message, "red" if errors.is_terminal else "")
    sys.exit(status)
