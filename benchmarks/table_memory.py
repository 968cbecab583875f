"""Training on a table in little memory: python benchmarks/table_memory.py [--gigabytes 4] [--limit 1] [--kind parquet]

Writes a table of random numbers, of 32 features and a class of four, into a temporary folder, and trains an epoch on
it in a process that may have ``--limit`` gigabytes beside what it has once PyTorch and a first step are there. The
limit is RLIMIT_DATA: all memory of a process's own that can be written to, whether it is touched or not. It does not
count files that are memory-mapped to be read, whose pages the system takes back when it needs them. Ends with status 1
if the process does not get through the epoch.
"""

import argparse
import multiprocessing
import re
import resource
import sys
import tempfile
import time
from pathlib import Path
from threading import Event, Thread

import numpy as np

FEATURES, CLASSES, ROWS = 32, 4, 100_000
BATCH = 1024


def write(path: Path, gigabytes: float) -> None:
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


def memory(key: str) -> int:
    """Bytes of this process: ``VmData`` is what is limited, ``RssAnon`` what of it is in memory."""
    [kilobytes] = re.findall(rf"^{key}:\s+(\d+) kB$", Path("/proc/self/status").read_text(encoding="utf-8"), re.M)
    return int(kilobytes) * 1024


class Peak:
    """The most that a figure has been above what it was, looked at all the time."""

    def __init__(self, key: str) -> None:
        self.most, self._ended = 0, Event()
        self._thread = Thread(target=self._watch, args=(key, memory(key)), daemon=True)
        self._thread.start()

    def _watch(self, key: str, before: int) -> None:
        while not self._ended.wait(0.01):
            self.most = max(self.most, memory(key) - before)

    def end(self) -> float:
        """Gigabytes."""
        self._ended.set()
        self._thread.join()
        return self.most / 1e9


def train(path: Path, limit: float) -> None:
    """An epoch, in a process of its own."""
    import torch
    from torch import nn

    from raytorch.config.file import from_data
    from raytorch.datasets import TrainLoader, evaluation_batches, load_splits

    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, CLASSES))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def step(features: torch.Tensor, targets: torch.Tensor) -> float:
        loss = nn.functional.cross_entropy(model(features), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    step(torch.zeros(BATCH, FEATURES), torch.zeros(BATCH, dtype=torch.int64))
    peaks = [Peak(key) for key in ("VmData", "RssAnon")]
    most = memory("VmData") + int(limit * 1e9)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    begun = time.perf_counter()
    section = {"name": "table", "root": str(path.parent), "train": path.name, "test": 0.01, "standardize": True}
    splits = load_splits(from_data({"epochs": 1, "data": section}), torch.device("cpu"))
    opened = time.perf_counter() - begun
    loader = TrainLoader(splits.train, batch_size=BATCH, blocks=splits.train.blocks)  # type: ignore[attr-defined]
    seen, loss = 0, 0.0
    for [batch] in loader.remaining():
        loss = step(*batch.content)
        seen += batch.samples
    right = counted = 0
    with torch.no_grad():
        for batch in evaluation_batches(splits.judged, batch_size=BATCH):
            features, targets = batch.content
            right += int((model(features).argmax(1) == targets).sum())
            counted += batch.samples
    seconds = time.perf_counter() - begun
    limited, resident = (peak.end() for peak in peaks)
    print(
        f"{path.stat().st_size / 1e9:.2f} GB of {path.suffix[1:]}, opened in {opened:.1f} s\n"
        f"trained on {seen:,} rows and tested on {counted:,} in {seconds - opened:.1f} s: loss {loss:.3f}, accuracy "
        f"{right / counted:.3f}\nat most {limited:.2f} GB beside PyTorch's own, {resident:.2f} GB of them in memory",
        flush=True,
    )
    if seen != len(splits.train):
        sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.2)
    parser.add_argument("--limit", type=float, default=1, help="gigabytes beside PyTorch's own")
    parser.add_argument("--kind", choices=["parquet", "arrow", "csv"], default="parquet")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="raytorch-table-") as folder:
        path = Path(folder) / f"table.{options.kind}"
        write(path, options.gigabytes)
        process = multiprocessing.get_context("spawn").Process(target=train, args=(path, options.limit))
        process.start()
        process.join()
        sys.exit(process.exitcode)


if __name__ == "__main__":
    main()
