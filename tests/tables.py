"""Tables for tests, in files of every format."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow as pa
import torch
from pyarrow import feather, parquet

from raytorch.config import RunConfig
from raytorch.config.file import from_data
from raytorch.sources import open_source


def frame(rows: int = 250, seed: int = 0) -> pandas.DataFrame:
    rng = np.random.default_rng(seed)
    whole = pandas.Series(rng.integers(-5, 2**40, rows), dtype="Int64")
    return pandas.DataFrame(
        {
            "wide": np.where(rng.random(rows) < 0.1, np.nan, rng.standard_normal(rows) + 1e4),
            "whole": whole.where(rng.random(rows) > 0.1),
            "yes": rng.random(rows) < 0.3,
            "city": rng.choice(["Oslo", "Århus", "a,b"], rows),
            "y": rng.choice(["no", "perhaps", "yes"], rows),
        }
    )


def write(path: Path, data: pandas.DataFrame, rows: int = 40) -> None:
    """In the format that the name says, in blocks of so many rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.name.split(".", 1)[1]
    if "sv" in kind:
        data.to_csv(path, index=False, sep="\t" if kind == "tsv" else ",")
        return
    table = pa.Table.from_pandas(data, preserve_index=False)
    match kind:
        case "parquet":
            parquet.write_table(table, path, row_group_size=rows)
        case "feather":
            feather.write_feather(table, path, compression="lz4", chunksize=rows)
        case "arrow":
            feather.write_feather(table, path, compression="uncompressed", chunksize=rows)
        case "ipc":
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table, max_chunksize=rows)


def config(root: Path, run: dict[str, Any] | None = None, **data: Any) -> RunConfig:
    section = {"name": "table", "root": str(root), "target": "y", "categories": "codes", "missing": "zero"} | data
    return from_data({"epochs": 1, "data": section, **(run or {})})


def opened(root: Path, split: str = "train", *, training: bool = True, **data: Any) -> Any:
    return open_source(config(root, **data).data, split, training=training)


def everything(table: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    features, targets = table.batch(torch.arange(len(table)))
    return features.numpy(), targets.numpy()
