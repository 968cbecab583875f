"""Commands that run a configuration many times."""

import json
from pathlib import Path
from typing import Annotated

import typer

from raytorch.cli.common import EXIT_STOPPED, AsJson, Overrides, Storage, errors, new_app, output
from raytorch.errors import UserError

app = new_app()


@app.command()
def sweep(
    file: Annotated[Path | None, typer.Argument(help="YAML file of the sweep.")] = None,
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option(help="Name of the sweep and its folder.")] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="SWEEP", help="Go on with a sweep, by its name or path.")
    ] = None,
    storage: Storage = "runs",
    address: Annotated[str | None, typer.Option(help="A running Ray cluster; by default one is started here.")] = None,
    as_json: AsJson = False,
) -> int:
    """Train a run with many values of its keys, and find the best."""
    from raytorch.service.sweep import plan_resumed_sweep, plan_sweep, run_sweep
    from raytorch.service.sweep_display import SweepDisplay, print_sweep
    from raytorch.sweep_file import load_sweep

    if resume and (file or overrides or name):
        raise UserError("--resume goes on with a sweep as it was planned; give no file, --set or --name beside it")
    if resume:
        plan = plan_resumed_sweep(resume, storage)
    elif file:
        plan = plan_sweep(load_sweep(file, overrides or []), name)
    else:
        raise UserError("give a sweep's file, e.g. configs/sweeps/digits.yaml, or --resume SWEEP")
    with SweepDisplay(errors, plan.sweep.trials) as display:
        summary = run_sweep(plan, address=address, watch=display)
    if as_json:
        print(json.dumps(summary))  # noqa: T201
    else:
        print_sweep(output, plan.sweep.trials, summary)
    return EXIT_STOPPED if summary["state"] == "stopped" else 0
