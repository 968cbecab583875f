"""Commands about the files of data sets."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from raytorch.cli.common import new_app, output, progress
from raytorch.errors import UserError
from raytorch.system.terminal import say

app = new_app()

DataName = Annotated[Literal["mnist", "cifar10"], typer.Argument(help="mnist or cifar10.")]
DataRoot = Annotated[str, typer.Option(help="Folder of the files, data.root of a run.")]


@app.command("prepare")
def prepare_data(name: DataName, root: DataRoot = "data") -> None:
    """Download what a data set lacks, verify it and unpack it."""
    from raytorch.cli.progress import DownloadDisplay
    from raytorch.datasets import prepare

    with DownloadDisplay(progress) as display:
        prepare(_stored(name, root), display)
    check_data(name, root)


@app.command("check")
def check_data(name: DataName, root: DataRoot = "data") -> None:
    """Read all of a data set's files and verify that they are in order."""
    from raytorch.datasets.files import count

    images = " + ".join(f"{number:,}" for number in count(_stored(name, root)).values())
    say(output, f"{name} in {root}: {images} images")


@app.command("index")
def index_shards(
    shards: Annotated[list[Path], typer.Argument(help="Tar shards, or folders of them, in WebDataset's layout.")],
) -> None:
    """Write an index beside each tar shard, by which data: shards reads its samples."""
    from raytorch.errors import DataError
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


def _stored(name: str, root: str) -> Any:
    from raytorch.config import Cifar10Data, MnistData

    return Cifar10Data(root=root) if name == "cifar10" else MnistData(root=root)
