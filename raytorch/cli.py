"""The ``raytorch`` command. Imports neither torch nor ray before a command needs them.

Exit status: 0 success, 1 the run or the export failed, 2 the input has to change, 130 stopped by Ctrl-C.
"""

import json
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Column, Table

from raytorch.errors import RaytorchError, UserError
from raytorch.model_files import ExportFormat

EXIT_FAILED, EXIT_INPUT, EXIT_STOPPED = 1, 2, 130

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
data = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data, name="data", help="Download the files of a data set, or verify them.")
errors = Console(stderr=True, highlight=False)
output = Console(highlight=False)

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="K=V", help="Change a key of the file, e.g. optimizer.lr=0.01.")
]
Storage = Annotated[str, typer.Option(help="Folder or URI that holds the runs.")]
DataName = Annotated[Literal["mnist", "cifar10"], typer.Argument(help="mnist or cifar10.")]
DataRoot = Annotated[str, typer.Option(help="Folder of the files, data.root of a run.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


def main() -> None:
    """Run the command line."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except typer.Exit as end:
        sys.exit(end.exit_code)
    except UserError as error:
        _complain(str(error), EXIT_INPUT)
    except RaytorchError as error:
        _complain(str(error), EXIT_FAILED)
    except (KeyboardInterrupt, typer.Abort):
        _complain("stopped", EXIT_STOPPED)
    except Exception as error:
        if not hasattr(error, "format_message"):  # anything but a usage error of the command line itself
            raise
        _complain(error.format_message(), EXIT_INPUT)


@app.command()
def train(
    config: Annotated[
        Path | None, typer.Argument(help="YAML file of the run; with --resume, the run's own by default.")
    ] = None,
    overrides: Overrides = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Workers, in place of scaling.workers.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run and its folder.")] = None,
    resume: Annotated[str | None, typer.Option(metavar="RUN", help="Continue a run, by its name or path.")] = None,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster; by default one is started here.")] = None,
    as_json: AsJson = False,
) -> int:
    """Train the model that CONFIG describes."""
    from raytorch.progress import ProgressDisplay, print_summary
    from raytorch.trainer import train as run

    plan = _plan(config, [*(overrides or []), *([f"scaling.workers={workers}"] if workers else [])], name, resume)
    with ProgressDisplay(errors, plan.config.name) as display:
        summary = run(plan, address=address, watch=display)
    if as_json:
        print(json.dumps(summary))  # noqa: T201
    else:
        print_summary(output, summary)
    return EXIT_STOPPED if summary["state"] == "stopped" else 0


@app.command()
def validate(
    files: Annotated[list[Path], typer.Argument(help="YAML files of runs.")], overrides: Overrides = None
) -> int:
    """Check configuration files without running them."""
    from raytorch.config_file import load

    problems = []
    for file in files:
        try:
            load(file, overrides or [])
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


@app.command()
def runs(storage: Storage = "runs", as_json: AsJson = False) -> None:
    """List the runs of a storage."""
    from raytorch.runs import list_runs

    found = list_runs(storage)
    if as_json:
        print(json.dumps(found))  # noqa: T201
        return
    table = Table(
        Column("run", overflow="fold"), "state", "accuracy", "loss", "epochs", "samples/s", "seconds", box=None
    )
    for summary in found:
        table.add_row(*_row(summary))
    output.print(table if found else f"no runs in {storage}")


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="A run, by its name or path.")],
    storage: Storage = "runs",
    out: Annotated[Path | None, typer.Option(help="Picture to write (.png, .svg, .pdf); by default RUN.png.")] = None,
) -> None:
    """Draw a run's curves into a picture."""
    from raytorch.report import write_report
    from raytorch.runs import find_run

    folder = find_run(run, storage)
    output.print(str(write_report(folder, out or Path(f"{folder.name}.png"))), soft_wrap=True, markup=False)


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="A run, by its name or path.")],
    kind: Annotated[ExportFormat, typer.Option("--format", help="Format of the file.")],
    out: Annotated[Path | None, typer.Option(help="File to write; by default RUN and the format's suffix.")] = None,
    verify: Annotated[bool, typer.Option(help="Compare the file's outputs with the model's.")] = True,
    storage: Storage = "runs",
) -> None:
    """Export the model in a run's latest checkpoint."""
    from raytorch.runs import find_run

    folder = find_run(run, storage)
    from raytorch.export import SUFFIXES, export_run  # torch takes seconds, a run that is not there should not

    path = out or Path(f"{folder.name}{SUFFIXES[kind]}")
    differences = export_run(folder, kind, path, verify=verify)
    output.print(str(path), soft_wrap=True, markup=False)
    for difference in differences:
        output.print(f"verified  {difference}", soft_wrap=True, markup=False)


@data.command("prepare")
def prepare_data(name: DataName, root: DataRoot = "data") -> None:
    """Download what a data set lacks, verify it and unpack it."""
    from raytorch.datasets import prepare
    from raytorch.progress import DownloadDisplay

    with DownloadDisplay(errors) as display:
        prepare(_stored(name, root), display)
    check_data(name, root)


@data.command("check")
def check_data(name: DataName, root: DataRoot = "data") -> None:
    """Read all of a data set's files and verify that they are in order."""
    from raytorch.datasets.files import count

    images = " + ".join(f"{number:,}" for number in count(_stored(name, root)).values())
    output.print(f"{name} in {root}: {images} images", soft_wrap=True, markup=False)


def _stored(name: str, root: str) -> Any:
    from raytorch.config import Cifar10Data, MnistData

    return Cifar10Data(root=root) if name == "cifar10" else MnistData(root=root)


def _plan(config: Path | None, overrides: list[str], name: str | None, resume: str | None) -> Any:
    from raytorch.config_file import load
    from raytorch.runs import plan_resume, plan_run

    if resume and name:
        raise UserError("--name does not go with --resume: a resumed run keeps its name")
    if resume:
        if config is None and overrides:
            raise UserError("--set and --workers change a configuration file; give it beside --resume")
        return plan_resume(resume, load(config, overrides) if config else None)
    if config is None:
        raise UserError("give a configuration file, e.g. configs/quickstart.yaml, or --resume RUN")
    return plan_run(load(config, overrides), name)


def _row(summary: dict[str, Any]) -> list[str]:
    def number(key: str, form: str) -> str:
        return format(summary[key], form) if summary.get(key) is not None else ""

    return [
        summary["name"],
        summary["state"],
        number("accuracy", ".4f"),
        number("loss", ".4f"),
        number("epochs", ".4g"),
        number("samples_per_s", ",.0f"),
        format(summary.get("seconds", {}).get("total", 0), ".1f"),
    ]


def _complain(message: str, status: int) -> None:
    errors.print(message, style="red" if errors.is_terminal else "", markup=False, soft_wrap=True)
    sys.exit(status)
