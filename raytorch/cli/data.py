"""Commands about the files of data sets."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from raytorch.cli.common import new_app, output, progress
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


def _stored(name: str, root: str) -> Any:
    from raytorch.config import Cifar10Data, MnistData

    return Cifar10Data(root=root) if name == "cifar10" else MnistData(root=root)
