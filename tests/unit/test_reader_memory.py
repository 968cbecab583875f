"""The memory of readers: what they have in common, and what their batches hold."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raytorch.datasets import TrainLoader
from raytorch.datasets.own import OwnDataset
from raytorch.datasets.readers import Readers

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")


def read(data: Any, readers: int = 2, samples: int = 8) -> list[Any]:
    """The batches of an epoch."""
    loader = TrainLoader(OwnDataset(data, CPU, readers=readers), batch_size=samples)
    return [part.content for step in loader.remaining() for part in step]


def kilobytes(maps: str, of: str) -> dict[str, int]:
    """What ``/proc/PID/smaps`` says of the mappings of a file, added up."""
    found: dict[str, int] = {}
    is_of = False
    for line in maps.splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            is_of = of in line
        elif is_of and (size := re.match(r"(\w+): +(\d+) kB", line)):
            found[size[1]] = found.get(size[1], 0) + int(size[2])
    return found


def test_numbers_of_a_data_set_are_there_once_for_all_of_its_readers_and_are_not_changed_by_each_other() -> None:
    tensor, array = torch.ones(4_000_000), np.ones(4_000_000, np.float32)

    def look(request: Any) -> Any:
        total = tensor.sum() + array.sum()
        tensor[0] += 1
        return float(total), Path("/proc/self/smaps").read_text(encoding="utf-8")

    for total, maps in Readers(look, 2).read(range(2)):
        assert total == 8_000_000
        sizes = kilobytes(maps, "memfd:raytorch")
        assert sizes["Rss"] >= 31_250
        assert sizes["Anonymous"] < 1_000  # a copy of what was changed


def test_what_is_mapped_from_a_file_is_mapped_by_readers_too(tmp_path: Path) -> None:
    file = tmp_path / "tokens.bin"
    np.arange(100_000, dtype=np.int32).tofile(file)
    whole = np.memmap(file, np.int32, "r", 40)
    changed = np.memmap(file, np.int32, "c")
    changed[0] = 7
    parts = [whole, whole[5:90_000:7], whole[:6].reshape(2, 3).T, np.asarray(whole)[::-1]]
    late = np.memmap(file, np.int32, "r+", 5_000 * 4, (300, 100))

    def look(request: Any) -> Any:
        late[1, 1] = 3
        files = [str(each.filename) for each in [*parts, late, changed]]
        return [np.array(each) for each in parts], files, int(changed[0])

    [(arrived, files, first)] = Readers(look, 1).read([None])
    for part, same in zip(parts, arrived, strict=True):
        assert np.array_equal(part, same)
    assert files == [str(file)] * 5 + ["None"]
    assert (first, late[1, 1]) == (7, 3)


def test_memory_is_held_for_few_batches_and_for_none_when_all_are_read() -> None:
    def held() -> int:
        return kilobytes(Path("/proc/self/smaps").read_text(encoding="utf-8"), "memfd:raytorch").get("Rss", 0) // 1024

    def looked_at(answers: Iterator[Any]) -> Iterator[Any]:
        return (answer for answer in answers if answer.any())  # which maps its memory

    readers = Readers(lambda request: np.full(1 << 20, request, np.uint8), 1)
    before = held()
    answers = looked_at(readers.read(range(1, 61)))
    many = [next(answers) for _ in range(40)]
    assert held() - before >= 40
    del many
    for _ in range(10):
        next(answers)
    assert held() - before < 20
    last = [*answers][-1]
    assert held() - before <= 2
    assert (last == 60).all()
    del last
    assert held() == before
    assert [int(each[0]) for each in looked_at(readers.read(range(1, 9)))] == list(range(1, 9))
