"""The command that tells what a run will take."""

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from raytorch.cli import common
from raytorch.errors import UserError
from raytorch.system.terminal import cell, say, say_labelled, say_table

app = common.new_app()
_UNITS = {"": 10**9, "MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.")],
    overrides: common.Overrides = None,
    workers: common.Workers = None,
    gpu_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of a GPU, e.g. 80GB: refuse a run that takes more.")
    ] = None,
    facts: Annotated[
        list[str] | None,
        typer.Option("--fact", metavar="K=V", help="A fact of data that is not here, e.g. vocabulary=50257."),
    ] = None,
    as_json: common.AsJson = False,
) -> int:
    """Tell what CONFIG will take, without training it: memory of a worker, operations, checkpoints."""
    room = _bytes(gpu_memory) if gpu_memory else None
    told = dict(map(_fact, facts or []))
    read = common.config_from_options(config, overrides, workers, None, None)
    from raytorch.training.budget import advice, budget  # torch takes seconds, a mistake should not

    planned = budget(read, told, on_gpu=True if room else None)
    if as_json:
        common.print_json(planned.to_dict())
    else:
        _show(planned)
    if room and planned.total > room:
        what = f"{config}: a worker takes {_size(planned.total)}, and its GPU has {_size(room)}"
        raise UserError(f"{what}: {advice(read, planned)}")
    return 0


def _show(planned: Any) -> None:
    frozen = planned.parameters - planned.trained
    flops = f"{planned.flops / 1e12:,.4g} TFLOP, forward and backward" if planned.flops else "not counted"
    lines = {
        "parameters": f"{planned.parameters:,}" + (f", of which {frozen:,} are frozen" if frozen else ""),
        "workers": f"{planned.workers}, {planned.strategy}, {planned.precision}",
        "batch": f"{planned.samples:,} samples at once on a worker",
        "a step": flops,
        "checkpoint": f"{_size(planned.checkpoint)} each",
    }
    for label, text in lines.items():
        say_labelled(common.output, label, text, 12)
    table = Table(Column(cell("memory of a worker")), Column(cell("at its largest"), justify="right"), box=None)
    for kind, size in sorted(planned.memory.items(), key=lambda each: -each[1]):
        table.add_row(cell(kind), cell(_size(size)))
    table.add_row(cell("in all", "bold"), cell(_size(planned.total), "bold"))
    say_table(common.output, table)
    for note in planned.notes:
        say(common.output, f"note: {note}", "dim")


def _size(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.2f} MB"


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", text.strip())
    unit = _UNITS.get(found[2].upper()) if found else None
    if not found or unit is None or float(found[1]) <= 0:
        raise UserError(f"--gpu-memory {text}: must be a size such as 80GB or 24GiB")
    return int(float(found[1]) * unit)


def _fact(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not (name and separator):
        raise UserError(f"--fact {text}: must be NAME=VALUE, such as vocabulary=50257")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
