"""Commands that start runs, and that check and explain their files."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from raytorch.cli.common import EXIT_STOPPED, AsJson, Name, Overrides, Workers, errors, new_app, output
from raytorch.errors import UserError

app = new_app()


@app.command()
def train(
    config: Annotated[
        Path | None, typer.Argument(help="YAML file of the run; with --resume, the run's own by default.")
    ] = None,
    overrides: Overrides = None,
    workers: Workers = None,
    name: Name = None,
    resume: Annotated[str | None, typer.Option(metavar="RUN", help="Continue a run, by its name or path.")] = None,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster; by default one is started here.")] = None,
    as_json: AsJson = False,
) -> int:
    """Train the model that CONFIG describes."""
    from raytorch.progress import ProgressDisplay, print_summary
    from raytorch.trainer import train as run

    plan = plan_from_options(config, overrides, workers, name, resume)
    with ProgressDisplay(errors, plan.config.name) as display:
        summary = run(plan, address=address, watch=display)
    if as_json:
        print(json.dumps(summary))  # noqa: T201
    else:
        print_summary(output, summary)
    return EXIT_STOPPED if summary["state"] == "stopped" else 0


@app.command()
def validate(
    files: Annotated[list[Path], typer.Argument(help="YAML files of runs and sweeps.")], overrides: Overrides = None
) -> int:
    """Check configuration files without running them."""
    from raytorch.config_file import load
    from raytorch.sweep_file import is_sweep, load_sweep

    problems = []
    for file in files:
        try:
            (load_sweep if is_sweep(file) else load)(file, overrides or [])
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    output.print(f"{len(files)} valid")
    return 0


@app.command()
def schema() -> None:
    """Print the JSON schema of a configuration file, for editors."""
    from raytorch.config_file import schema as json_schema

    print(json.dumps(json_schema(), indent=2))  # noqa: T201


def plan_from_options(
    config: Path | None, overrides: list[str] | None, workers: int | None, name: str | None, resume: str | None
) -> Any:
    """The run that the command line describes, ready to start."""
    from raytorch.config_file import load
    from raytorch.runs import plan_resume, plan_run

    changes = [*(overrides or []), *([f"scaling.workers={workers}"] if workers else [])]
    if resume and name:
        raise UserError("--name does not go with --resume: a resumed run keeps its name")
    if resume:
        if config is None and changes:
            raise UserError("--set and --workers change a configuration file; give it beside --resume")
        return plan_resume(resume, load(config, changes) if config else None)
    if config is None:
        raise UserError("give a configuration file, e.g. configs/quickstart.yaml, or --resume RUN")
    return plan_run(load(config, changes), name)
