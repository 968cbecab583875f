"""Commands that start runs, and that check and explain their files."""

import json
from pathlib import Path
from typing import Annotated

import typer

from raytorch.cli import common
from raytorch.errors import UserError
from raytorch.system.terminal import say

app = common.new_app()


@app.command()
def train(
    config: Annotated[
        Path | None, typer.Argument(help="YAML file of the run; with --resume, the run's own by default.")
    ] = None,
    overrides: common.Overrides = None,
    workers: common.Workers = None,
    name: common.Name = None,
    resume: Annotated[str | None, typer.Option(metavar="RUN", help="Continue a run, by its name or path.")] = None,
    storage: Annotated[
        str | None, typer.Option(help="Folder or URI that holds the runs, in place of the file's.")
    ] = None,
    changed_code: common.ChangedCode = False,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster; by default one is started here.")] = None,
    as_json: common.AsJson = False,
) -> int:
    """Train the model that CONFIG describes."""
    from raytorch.cli.progress import ProgressDisplay, print_summary
    from raytorch.runs.plan import more_to_do, timed_name
    from raytorch.runs.storage import split
    from raytorch.training import api

    changed = common.config_from_options(config, overrides, workers, name, resume, storage or "runs")
    if not resume and name is None:
        name = timed_name(changed.name)
    with ProgressDisplay(common.progress, split(resume or name or "")[1]) as display:
        if resume:
            result = api.resume(
                resume, changed, storage=storage, changed_code=changed_code, address=address, watch=display
            )
        else:
            result = api.train(changed, name=name, storage=storage, address=address, watch=display)
    if not display.has_news:
        say(
            common.progress,
            f"{result.name} has finished and nothing is left to do; to go on, give "
            f"{more_to_do(result.summary)} by --set",
        )
    summary = result.summary
    if as_json:
        common.print_json(summary)
    else:
        print_summary(common.output, summary)
    return common.EXIT_STOPPED if result.state == "stopped" else 0


@app.command()
def validate(
    files: Annotated[list[Path], typer.Argument(help="YAML files of runs and sweeps.")],
    overrides: common.Overrides = None,
) -> None:
    """Check configuration files without running them."""
    from raytorch.config.file import load_config
    from raytorch.sweeps.file import is_sweep, load_sweep

    problems = []
    for file in files:
        try:
            (load_sweep if is_sweep(file) else load_config)(file, overrides or [])
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    say(common.output, f"{len(files)} valid")


@app.command()
def schema() -> None:
    """Print the JSON schema of a configuration file, for editors."""
    from raytorch.config.json_schema import schema as json_schema

    print(json.dumps(json_schema(), indent=2))  # noqa: T201
