"""Commands about data: the files of data sets that are published, and what a run would read."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Column, Table

from raytorch.cli.common import Overrides, new_app, output, progress
from raytorch.errors import ConfigError, DataError, UserError
from raytorch.system.terminal import cell, say, say_labelled, say_table

app = new_app()

_PUBLISHED = ("mnist", "cifar10")
_LABEL = 12
"""Characters of what stands in front of a line."""
_LONGEST = 400
"""Characters of the facts."""
_FEW = 3
"""Samples that are told one by one whatever they are."""
_MOST_CLASSES = 30
"""Classes of which the samples are told."""

DataName = Annotated[Literal["mnist", "cifar10"], typer.Argument(help="mnist or cifar10.")]
DataRoot = Annotated[str, typer.Option(help="Folder of the files, data.root of a run.")]
ConfigFile = Annotated[Path, typer.Argument(help="YAML file of the run.")]


@app.command("prepare")
def prepare_data(name: DataName, root: DataRoot = "data") -> None:
    """Download what a data set lacks, verify it and unpack it."""
    from raytorch.cli.progress import DownloadDisplay
    from raytorch.datasets import prepare

    with DownloadDisplay(progress) as display:
        prepare(_stored(name, root), display)
    _check_published(name, root)


@app.command("check")
def check_data(
    what: Annotated[str, typer.Argument(help="YAML file of a run, or mnist or cifar10.")],
    root: Annotated[
        str | None, typer.Option(help="Folder of the files of mnist or cifar10, by default data.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    every: Annotated[
        bool, typer.Option("--all", help="List each sample that cannot be read, not the first ones of each kind.")
    ] = False,
) -> None:
    """Read all that a run would read, or all of a published data set's files, and tell what is not in order."""
    if what in _PUBLISHED:
        if overrides or every:
            option = "--set changes" if overrides else "--all is for"
            raise UserError(f"{option} a configuration, and {what} is a data set; give --root, or a run's file")
        _check_published(what, root or "data")
    elif root is not None:
        raise UserError("--root goes with mnist or cifar10; of a configuration, change it by --set data.root=...")
    else:
        _check_run(Path(what), overrides or [], every=every)


@app.command("show")
def show_data(
    config: ConfigFile,
    overrides: Overrides = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "train",
    samples: Annotated[int, typer.Option(min=1, max=10_000, help="How many, the first ones.")] = 16,
    out: Annotated[
        Path | None, typer.Option(help="Picture to write, of images; by default CONFIG-SPLIT.png in this folder.")
    ] = None,
) -> None:
    """Show the first samples as a run would train on them: a picture of images, a table of what else they are."""
    read = _load(config, overrides or [])
    from raytorch.datasets.showing import (
        columns_of,
        look_at,
        write_picture,
    )  # torch takes seconds, a mistake should not

    look = look_at(read, split, samples)
    if look.images is not None:
        picture = out or Path(f"{config.stem}-{split}.png")
        write_picture(look.images, picture)
        number = len(look.images)
        say(output, f"{picture}: {number} of {split}, {columns_of(number)} in a row")
    elif out is not None:
        raise UserError(f"--out is for a picture, and the samples of {split} are no images")
    columns = list(dict.fromkeys(key for row in look.rows for key in row))
    if columns:
        table = Table(Column(cell("sample")), *(Column(cell(key)) for key in columns), box=None)
        for place, row in enumerate(look.rows, start=1):
            table.add_row(str(place), *(cell(row.get(key, "")) for key in columns))
        say_table(output, table)


def _check_published(name: str, root: str) -> None:
    from raytorch.datasets.files import count

    images = " + ".join(f"{number:,}" for number in count(_stored(name, root)).values())
    say(output, f"{name} in {root}: {images} images")


@app.command("index")
def index_shards(
    shards: Annotated[list[Path], typer.Argument(help="Tar shards, or folders of them, in WebDataset's layout.")],
) -> None:
    """Write an index beside each tar shard, by which data: shards reads its samples."""
    from raytorch.sources.shard_index import write_index

    for path in shards:
        found = sorted(path.rglob("*.tar")) if path.is_dir() else [path]
        if not found:
            raise DataError(f"{path}: expected tar shards, found no .tar file")
        for shard in found:
            say(output, f"{shard}: {write_index(shard):,} samples")


@app.command("tokenize")
def tokenize_text(
    files: Annotated[list[str], typer.Argument(help="Text files, patterns, and folders of .txt and .jsonl files.")],
    out: Annotated[Path, typer.Option(help="Folder for train.tokens and what belongs to it, data.root of a run.")],
    tokenizer: Annotated[
        str, typer.Option(help="bytes, or the path of a tokenizer.json of the package tokenizers.")
    ] = "bytes",
    validation: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the documents for validation.tokens, drawn by the seed.")
    ] = 0.0,
    test: Annotated[float, typer.Option(min=0, max=1, help="Share of the documents for test.tokens.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed by which documents are drawn.")] = 0,
    document_per: Annotated[
        Literal["file", "line", "paragraph"], typer.Option(help="What of a file of plain text is a document.")
    ] = "file",
    key: Annotated[str, typer.Option(help="Where the text is in each line of a .jsonl file.")] = "text",
    end_token: Annotated[
        str | None,
        typer.Option(help="What the tokenizer calls the token behind each document; by default a known name."),
    ] = None,
) -> None:
    """Write the tokens of text files, for data: tokens of a run."""
    from raytorch.cli.progress import DownloadDisplay
    from raytorch.sources.documents import TextFile
    from raytorch.sources.tokenizing import found, open_tokenizer, split_path, tokenize

    shares = {name: share for name, share in (("validation", validation), ("test", test)) if share}
    if sum(shares.values()) >= 1:
        raise UserError(f"--validation {validation:g} and --test {test:g} leave nothing to train on")
    texts = found(files)
    size = sum(file.size for _, file in texts)
    chosen = open_tokenizer(*split_path(tokenizer), end_token)
    read = (TextFile(*each, document_per=document_per, key=key) for each in texts)
    with DownloadDisplay(progress) as display:
        headers = tokenize(
            read, chosen, out, shares=shares, seed=seed, watch=lambda there: display("tokenized", there, size)
        )
    for name, header in headers.items():
        say(output, f"{out / name}.tokens: {header.tokens:,} tokens of {header.documents:,} documents, {header.dtype}")


def _check_run(file: Path, overrides: list[str], *, every: bool) -> None:
    config = _load(file, overrides)
    from raytorch.cli.progress import CheckDisplay
    from raytorch.datasets.checking import check_splits  # torch takes seconds, a mistake should not

    unreadable, problems, samples = 0, 0, 0
    facts: dict[str, Any] = {}
    with CheckDisplay(progress) as display:
        for checked in check_splits(config, display):
            _tell(checked, every=every)
            unreadable, samples = unreadable + len(checked.unreadable), samples + checked.samples
            problems += bool(checked.problem)
            facts = facts or checked.facts
    fits = _tell_model(config, facts)
    if unreadable or problems:
        found = f"{unreadable:,} of {samples:,} samples cannot be read" if unreadable else "not all of it can be read"
        raise DataError(f"{file}: {found}" + ("" if every or unreadable <= _FEW else "; --all lists each"))
    if not fits:
        raise DataError(f"{file}: all {samples:,} samples can be read, and what is to be trained does not go with them")
    say(output, f"all {samples:,} samples can be read")


def _tell_model(config: Any, facts: dict[str, Any]) -> bool:
    """Print whether the model of a run can be built for its data, and tell so; nothing of one of the user's own."""
    from raytorch.models.fitting import parameters_on

    try:
        parameters = parameters_on(config, facts)
    except ConfigError as error:
        say_labelled(output, "model", str(error), _LABEL)
        return False
    if parameters is not None:
        say_labelled(output, "model", f"{config.model.name} of {parameters:,} parameters", _LABEL)
    return True


def _tell(checked: Any, *, every: bool) -> None:
    """Print what was found of a split: ``every`` sample that cannot be read, or the first ones of each kind."""
    from raytorch.datasets.kinds_of_faults import told_by_kind

    lines = [(checked.name, f"{checked.samples:,} samples"), ("  facts", _short(json.dumps(checked.facts)))]
    lines += [("  batch" if not place else "", part) for place, part in enumerate(checked.batch)]
    if checked.classes:
        counts = [f"{name}: {count:,}" for name, count in checked.classes.items()]
        more = f", and {len(counts) - _MOST_CLASSES:,} more" if len(counts) > _MOST_CLASSES else ""
        lines.append(("  classes", ", ".join(counts[:_MOST_CLASSES]) + more))
    lines += [("  wrong", line) for line in told_by_kind(checked.unreadable, each=every)]
    if checked.problem:
        lines.append(("  wrong", checked.problem))
    for label, text in lines:
        say_labelled(output, label, text, _LABEL)


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def _load(file: Path, overrides: list[str]) -> Any:
    from raytorch.config.file import load_config

    return load_config(file, overrides)


def _stored(name: str, root: str) -> Any:
    from raytorch.config import Cifar10Data, MnistData

    return Cifar10Data(root=root) if name == "cifar10" else MnistData(root=root)
