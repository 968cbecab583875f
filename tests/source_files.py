"""Small data sets in files, one of each kind, and the configuration of a run on each."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from image_files import encoded, make_folders, picture
from pyarrow import parquet

from raytorch.sources.shard_index import write_index
from raytorch.sources.token_files import TokenWriter
from raytorch.sources.tokenizer import ByteTokenizer

SAMPLES = {"train": 60, "test": 9}
LM = """
from torch import nn


class Lm(nn.Module):
    def __init__(self, vocabulary: int):
        super().__init__()
        self.read, self.write = nn.Embedding(vocabulary, 8), nn.Linear(8, vocabulary)
        self.dropout = nn.Dropout(0.1)

    def forward(self, tokens):
        return self.write(self.dropout(self.read(tokens)))
"""
MLP = {"name": "mlp", "hidden": [16], "dropout": 0.1}
PIXELS = {"size": 16, "resize": 20, "augment": {"crop": True, "flip": True}}


def images(root: Path) -> dict[str, Any]:
    """PNG files in a folder for each class."""
    for split, samples in SAMPLES.items():
        make_folders(root, split, dict.fromkeys("abc", samples // 3), height=24, width=20)
    return {"data": {"name": "images", "root": str(root), **PIXELS}, "model": MLP}


def shards(root: Path) -> dict[str, Any]:
    """Tar files of images and classes, three for training."""
    for split, samples in SAMPLES.items():
        (root / split).mkdir(parents=True)
        for shard, numbers in enumerate(np.array_split(np.arange(samples), 3)):
            path = root / split / f"{shard}.tar"
            with tarfile.open(path, "w") as archive:
                for number in map(int, numbers):
                    for name, content in (
                        (f"{number:04}.png", encoded(picture(number, 24, 20), "PNG")),
                        (f"{number:04}.cls", str(number % 3).encode()),
                    ):
                        member = tarfile.TarInfo(name)
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
            write_index(path)
    data = {"name": "shards", "root": str(root), "fields": ["png", "cls"], **PIXELS}
    return {"data": data, "model": MLP, "shuffle": "blocks"}


def table(root: Path) -> dict[str, Any]:
    """Parquet files of row groups of 8 rows."""
    rng = np.random.default_rng(0)
    for split, samples in SAMPLES.items():
        (root / split).mkdir(parents=True)
        columns = {f"x{number}": rng.standard_normal(samples) for number in range(4)}
        rows = pa.table(columns | {"target": rng.integers(0, 3, samples)})
        parquet.write_table(rows, root / split / "rows.parquet", row_group_size=8)
    data = {"name": "table", "root": str(root), "standardize": True}
    return {"data": data, "model": MLP, "shuffle": "blocks"}


def tokens(root: Path) -> dict[str, Any]:
    """Files of byte tokens, and a model in the current folder."""
    root.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, samples in SAMPLES.items():
        with TokenWriter(root / f"{split}.tokens", ByteTokenizer()) as writer:
            for _ in range(samples):
                document = rng.integers(0, 256, 31).astype(np.uint16)
                writer.add(document, len(document))
                writer.end_document()
    Path("lm.py").write_text(LM, encoding="utf-8")
    data = {"name": "tokens", "root": str(root), "context": 32}
    return {"data": data, "model": "lm.py:Lm"}


SOURCES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "images": images,
    "shards": shards,
    "table": table,
    "tokens": tokens,
}
"""What writes the files of a source below a folder, and answers with the keys of a run on them."""
