"""Commands that run a configuration several times."""

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from raytorch.cli.common import AsJson, Overrides, errors, new_app, output
from raytorch.errors import UserError

app = new_app()


@app.command()
def scale(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.")],
    workers: Annotated[str, typer.Option(metavar="N,N,...", help="Numbers of workers, e.g. 1,2,4,8.")],
    mode: Annotated[
        Literal["weak", "strong"],
        typer.Option(help="weak: each worker keeps its batch, and the global one grows; strong: it stays."),
    ] = "weak",
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps to time at each size.")] = 200,
    warmup: Annotated[int, typer.Option(min=0, help="Optimizer steps before them.")] = 20,
    out: Annotated[str | None, typer.Option(help="Folder or URI of the results; by default in the storage.")] = None,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster; by default one is started here.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure how far CONFIG scales: samples/s, efficiency, and where the time goes."""
    from raytorch.service.scaling import RESULTS_FILE, plan_study, run_study
    from raytorch.service.scaling_report import table, write_picture

    study = plan_study(
        config, _numbers(workers), mode=mode, overrides=overrides or [], steps=steps, warmup=warmup, out=out
    )
    results = run_study(study, address=address, watching=_display)
    picture = write_picture(results, study.folder)
    if as_json:
        print(json.dumps(results))  # noqa: T201
        return
    output.print(table(results))
    output.print(f"results   {study.folder.file(RESULTS_FILE)}", soft_wrap=True, markup=False)
    output.print(f"picture   {picture}", soft_wrap=True, markup=False)


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise UserError(f"--workers {text}: must be numbers of at least 1, such as 1,2,4,8") from None


def _display(plan: Any) -> AbstractContextManager[Any]:
    from raytorch.progress import ProgressDisplay

    return ProgressDisplay(errors, plan.config.name)
