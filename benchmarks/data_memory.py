"""Training in little memory: python benchmarks/data_memory.py [--kind parquet|arrow|csv|tokens] [--gigabytes 4]

Writes a table of random numbers, of 32 features and a class of four, or a file of random tokens into a temporary
folder, and has a run train on it: an epoch of the table, or ``--steps`` of windows from anywhere in the tokens. Its
worker may take ``--limit`` gigabytes beside what it has when PyTorch is there and a first step was taken; how is said
in benchmarks/limited_memory.py. Ends with an error if the run does not get through.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

LIMIT = "DATA_MEMORY_LIMIT"
"""The environment variable that has the limit in bytes, for benchmarks/limited_memory.py."""
FEATURES, ROWS, DOCUMENT = 32, 100_000, 10_000
HERE = Path(__file__).resolve().parent


def write_table(path: Path, gigabytes: float) -> None:
    """A table of so many bytes, in blocks of ROWS."""
    import pyarrow as pa
    from pyarrow import csv, ipc, parquet

    rng = np.random.default_rng(0)
    names = [f"x{number}" for number in range(FEATURES)]
    schema = pa.schema([*((name, pa.float32()) for name in names), ("target", pa.int64())])
    writers = {
        ".parquet": lambda: parquet.ParquetWriter(path, schema, compression="none", use_dictionary=False),
        ".arrow": lambda: ipc.new_file(path, schema),
        ".csv": lambda: csv.CSVWriter(path, schema),
    }
    with writers[path.suffix]() as writer:
        while not path.exists() or path.stat().st_size < gigabytes * 1e9:
            numbers = rng.standard_normal((FEATURES, ROWS), dtype=np.float32)
            classes = (numbers[0] > 0) + 2 * (numbers[1] > numbers[2])
            writer.write_batch(pa.record_batch([*map(pa.array, numbers), pa.array(classes)], schema))


def write_tokens(path: Path, gigabytes: float) -> None:
    """A file of so many bytes, two of each token."""
    from raytorch.sources.token_files import TokenWriter
    from raytorch.sources.tokenizer import ByteTokenizer

    rng = np.random.default_rng(0)
    with TokenWriter(path, ByteTokenizer()) as writer:
        for _ in range(int(gigabytes * 1e9 / (2 * DOCUMENT))):
            writer.add(rng.integers(0, 256, DOCUMENT - 1, dtype=np.uint16), DOCUMENT - 1)
            writer.end_document()


def keys_of(path: Path, steps: int) -> dict[str, Any]:
    """The run's, of its data and model."""
    files = {"root": str(path.parent), "train": path.name}
    if path.suffix == ".tokens":
        data = {"name": "tokens", "context": 256, "test": 0.0001} | files
        return {"data": data, "model": "limited_memory.py:token_model", "steps": steps, "batch_size": 64}
    data = {"name": "table", "test": 0.01, "standardize": True} | files
    keys = {"data": data, "model": "limited_memory.py:table_model", "optimizer": {"name": "adam", "lr": 3e-3}}
    return keys | {"epochs": 1, "batch_size": 4096, "shuffle": "full" if path.suffix == ".arrow" else "blocks"}


def train(path: Path, steps: int) -> None:
    """A run in a Ray worker."""
    import raytorch

    os.chdir(HERE)  # where the models are found from
    told = path.with_name("most.json")
    begun = time.perf_counter()
    result = raytorch.train(
        keys_of(path, steps) | {"on_evaluation": {"name": "limited_memory.py:tell", "out": str(told)}},
        storage=path.parent / "runs",
        workers=1,
    )
    seconds, most = time.perf_counter() - begun, json.loads(told.read_text(encoding="utf-8"))
    metrics = ", ".join(f"{key} {value:.3f}" for key, value in result.metrics.items())
    print(
        f"{path.stat().st_size / 1e9:.2f} GB of {path.suffix[1:]}: {result.state} after {result.summary['step']:,} "
        f"steps and {seconds:.0f} s, {result.summary['restarts']} restarts; {metrics}\n"
        f"at most {most['VmData'] / 1e9:.2f} GB beside PyTorch's own, {most['RssAnon'] / 1e9:.2f} GB of them in "
        f"memory; the limit {'holds' if most['holds'] else 'DOES NOT HOLD'}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.2)
    parser.add_argument("--limit", type=float, default=1, help="gigabytes beside PyTorch's own")
    parser.add_argument("--kind", choices=["parquet", "arrow", "csv", "tokens"], default="parquet")
    parser.add_argument("--steps", type=int, default=2_000, help="of a run on tokens")
    options = parser.parse_args()
    os.environ[LIMIT] = str(int(options.limit * 1e9))  # which the worker inherits
    with tempfile.TemporaryDirectory(prefix="raytorch-data-") as folder:
        path = Path(folder) / f"train.{options.kind}"
        (write_tokens if options.kind == "tokens" else write_table)(path, options.gigabytes)
        train(path, options.steps)


if __name__ == "__main__":
    main()
