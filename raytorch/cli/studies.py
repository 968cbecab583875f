"""Commands that run a configuration several times."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from raytorch.cli.common import EXIT_STOPPED, AsJson, Overrides, errors, new_app, output, print_json, progress
from raytorch.errors import MissingPackageError, UserError
from raytorch.system.terminal import say, say_labelled

app = new_app()


@app.command()
def sweep(
    file: Annotated[Path | None, typer.Argument(help="YAML file of the sweep.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="K=V", help="Change a key of the sweep's file, e.g. trials=4."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the sweep and its folder.")] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="SWEEP", help="Go on with a sweep, by its name or path.")
    ] = None,
    storage: Annotated[
        str | None, typer.Option(help="Folder or URI that holds the sweep, in place of the file's.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster; by default one is started here.")] = None,
    as_json: AsJson = False,
) -> int:
    """Train a run with many values of its keys, and find the best."""
    from raytorch.config.file import one_line
    from raytorch.sweeps.file import load_sweep
    from raytorch.sweeps.live_table import SweepDisplay, print_sweep
    from raytorch.sweeps.sweep import plan_resumed_sweep, plan_sweep, run_sweep

    if resume and (file or overrides or name):
        raise UserError("--resume goes on with a sweep as it was planned; give no file, --set or --name beside it")
    if resume:
        plan = plan_resumed_sweep(resume, storage or "runs")
    elif file:
        placed = [f"storage={one_line(storage)}"] if storage else []
        plan = plan_sweep(load_sweep(file, [*(overrides or []), *placed]), name)
    else:
        raise UserError("give a sweep's file, e.g. configs/sweeps/digits.yaml, or --resume SWEEP")
    with SweepDisplay(progress, plan.sweep.trials) as display:
        summary = run_sweep(plan, address=address, watch=display)
    if as_json:
        print_json(summary)
    else:
        print_sweep(output, plan.sweep.trials, summary)
    return EXIT_STOPPED if summary["state"] == "stopped" else 0


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
    from raytorch.cli.progress import ProgressDisplay
    from raytorch.scaling.picture import write_picture
    from raytorch.scaling.study import RESULTS_FILE, plan_study, run_study
    from raytorch.scaling.table import results_table

    study = plan_study(
        config, _numbers(workers), mode=mode, overrides=overrides or [], steps=steps, warmup=warmup, out=out
    )
    results = run_study(study, address=address, watching=lambda plan: ProgressDisplay(progress, plan.config.name))
    try:
        pictures = [write_picture(results, study.folder)]
    except MissingPackageError as error:
        pictures = []
        say(errors, f"there is no picture of the study: {error}")
    if as_json:
        print_json(results)
        return
    output.print(results_table(results))
    say_labelled(output, "results", study.folder.file(RESULTS_FILE))
    for picture in pictures:
        say_labelled(output, "picture", picture)


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise UserError(f"--workers {text}: must be numbers of at least 1, such as 1,2,4,8") from None
