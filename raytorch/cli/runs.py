"""Commands about runs that there are: listing, drawing, exporting them, and having them write."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from raytorch.cli.common import AsJson, Storage, new_app, output, print_json
from raytorch.config.export_formats import ExportFormat
from raytorch.system.terminal import cell, say, say_part, say_table

app = new_app()


@app.command()
def runs(storage: Storage = "runs", as_json: AsJson = False) -> None:
    """List the runs of a storage."""
    from raytorch.runs.catalog import list_runs
    from raytorch.runs.storage import locate

    found = list_runs(storage)
    if as_json:
        print_json(found)
        return
    metrics = list(dict.fromkeys(name for summary in found for name in _measured(summary)))
    if all(name.startswith("test ") for name in metrics):
        metrics = [name.removeprefix("test ") for name in metrics]
    columns = ["run", "state", *metrics, "epochs", "samples/s", "seconds"]
    table = Table(*(Column(cell(column)) for column in columns), box=None)
    for summary in found:
        table.add_row(*map(cell, _row(summary, metrics)))
    if found:
        say_table(output, table)
    else:
        missing = "://" not in storage and not Path(locate(storage)).exists()
        say(output, f"no runs in {storage}{': there is no such folder' if missing else ''}")


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="A run, by its name or path.")],
    storage: Storage = "runs",
    out: Annotated[
        Path | None,
        typer.Option(help="Picture to write (.png, .svg, .pdf); by default report.png in the run's folder."),
    ] = None,
) -> None:
    """Draw a run's curves into a picture."""
    from raytorch.runs.catalog import find_run
    from raytorch.runs.curves import write_report

    say(output, write_report(find_run(run, storage), out))


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="A run, by its name or path.")],
    kind: Annotated[ExportFormat, typer.Option("--format", help="Format of the file.")],
    out: Annotated[
        Path | None, typer.Option(help="File to write, for hf a folder; by default RUN and the format's suffix.")
    ] = None,
    verify: Annotated[bool, typer.Option(help="Compare the file's outputs with the model's.")] = True,
    code: Annotated[Path, typer.Option(help="File or folder that has the code of a model of your own.")] = Path(),
    model: Annotated[str | None, typer.Option(help="Which model, of a loop that has several.")] = None,
    storage: Storage = "runs",
) -> None:
    """Export the model in a run's latest checkpoint."""
    from raytorch.runs.catalog import find_run

    folder = find_run(run, storage)
    from raytorch.training.export import SUFFIXES, export_run  # torch takes seconds, a run that is not there should not

    path = out or Path(f"{folder.name}{SUFFIXES[kind]}")
    differences = export_run(folder, kind, path, verify=verify, code=code, model=model)
    say(output, path)
    for difference in differences:
        say(output, f"verified  {difference}")


@app.command()
def generate(
    run: Annotated[
        str,
        typer.Argument(help="A run, by its name or path, or a file of its model as export writes it, .safetensors."),
    ],
    prompt: Annotated[str, typer.Option(help="Text to go on from; without any a new document is begun.")] = "",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 200,
    samples: Annotated[int, typer.Option(min=1, help="Texts to write.")] = 1,
    temperature: Annotated[
        float, typer.Option(min=0, help="Below 1 likely tokens are likelier still; 0 takes the likeliest.")
    ] = 1.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw each token among so many of the likeliest.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed writes the same texts.")] = 0,
    tokenizer: Annotated[
        Path | None, typer.Option(help="The model's tokenizer.json, where the run's data does not have it.")
    ] = None,
    code: Annotated[Path, typer.Option(help="File or folder that has the code of a model of your own.")] = Path(),
    storage: Storage = "runs",
    as_json: AsJson = False,
) -> None:
    """Let the language model in a run's latest checkpoint go on with a text."""
    from raytorch.runs.catalog import find_run

    is_file = run.endswith(".safetensors")
    folder = None if is_file else find_run(run, storage)
    from raytorch.training.writing import TextWriter  # as above

    if folder:
        writer = TextWriter.of_run(folder, tokenizer=tokenizer, code=code)
    else:
        writer = TextWriter.of_file(Path(run), tokenizer=tokenizer, code=code)
    texts = [
        writer.write(prompt, tokens=tokens, temperature=temperature, top_k=top_k, seed=seed + number)
        for number in range(samples)
    ]
    if as_json:
        print_json([{"prompt": prompt, "text": "".join(text)} for text in texts])
        return
    for number, text in enumerate(texts, start=1):
        if samples > 1:
            say(output, f"-- {number} of {samples}", "dim")
        say_part(output, prompt)
        for part in text:
            say_part(output, part)
        say(output, "")


def _measured(summary: dict[str, Any]) -> dict[str, float]:
    """What a run came to, by split and name."""
    judged = {f"{summary.get('split', 'test')} {name}": value for name, value in summary.get("metrics", {}).items()}
    return judged | {f"test {name}": value for name, value in summary.get("test_metrics", {}).items()}


def _row(summary: dict[str, Any], metrics: Sequence[str]) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return format(value, form) if value is not None else ""

    measured = _measured(summary)
    cause = (summary.get("error") or {}).get("cause", "error")  # told where it was no error in the run
    return [
        summary["name"],
        summary["state"] if cause == "error" else f"{summary['state']}: {cause}",
        *(number(measured.get(name, measured.get(f"test {name}")), ".4f") for name in metrics),
        number(summary.get("epochs"), ".4g"),
        number(summary.get("samples_per_s"), ",.0f"),
        format(summary.get("seconds", {}).get("total") or 0, ".1f"),
    ]
