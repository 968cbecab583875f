"""Images that processes keep in memory together, and the memory that there is."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from raytorch.sources import shared_pixels
from raytorch.sources.shared_pixels import CHUNK, SharedPixels, share_of_machine
from raytorch.system import memory as of_system
from raytorch.system.memory import Memory, memory


def image(number: int, height: int = 30, width: int = 20) -> Tensor:
    return torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)


def in_child(work: Callable[[], object]) -> int:
    """The exit status of a forked process that does some work."""
    if not (child := os.fork()):
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


def test_processes_find_what_each_has_put_there() -> None:
    kept = SharedPixels(40, 8 * CHUNK)
    kept.put(0, image(0))
    in_child(lambda: [kept.put(number, image(number)) for number in range(1, 10)])
    in_child(lambda: [kept.put(number, image(number, 50 - number)) for number in range(10, 30)])
    kept.put(30, image(30))
    assert len(kept) == 31
    for number in range(31):
        found = kept.get(number)
        assert found is not None
        assert torch.equal(found, image(number, 50 - number if 10 <= number < 30 else 30))
    assert kept.get(35) is None


def test_it_holds_no_more_than_its_bound() -> None:
    kept = SharedPixels(10, 3 * CHUNK)
    large = torch.ones(2048, 2048, 3, dtype=torch.uint8)  # 12 of a chunk's 16 MB
    for number in range(6):
        kept.put(number, large * number)
    assert [number for number in range(10) if kept.get(number) is not None] == [0, 1, 2]
    kept.put(7, image(7))
    found = kept.get(7)
    assert found is not None
    assert torch.equal(found, image(7))
    larger = SharedPixels(2, 2 * CHUNK)
    larger.put(1, torch.ones(4096, 2048, 3, dtype=torch.uint8))  # of two chunks
    assert larger.get(1) is not None
    assert SharedPixels(2, 0).get(1) is None


def test_a_process_that_is_killed_leaves_it_to_the_others() -> None:
    kept = SharedPixels(40, 2 * CHUNK)
    assert in_child(lambda: [kept.put(1, image(1)), os.kill(os.getpid(), signal.SIGKILL)]) == signal.SIGKILL
    kept.put(2, image(2))
    assert all(torch.equal(found, image(number)) for number in (1, 2) if (found := kept.get(number)) is not None)
    assert len(kept) == 2


def test_a_part_of_the_memory_is_left_free(monkeypatch: pytest.MonkeyPatch) -> None:
    total = 400 * CHUNK
    there = [Memory(total // 2, total)]
    monkeypatch.setattr(shared_pixels, "memory", lambda: there[0])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert share_of_machine() == total // 16
    kept = SharedPixels(40, 10 * CHUNK)
    kept.put(1, image(1))
    there[0] = Memory(total // 4 + CHUNK - 1, total)
    kept.put(2, image(2))  # in the chunk that has been taken
    kept.put(3, torch.ones(2400, 2400, 3, dtype=torch.uint8))
    assert [number for number in range(40) if kept.get(number) is not None] == [1, 2]
    monkeypatch.setattr(shared_pixels, "memory", lambda: None)
    assert share_of_machine() == 0


def write(folder: Path, **files: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")
    return folder


def test_memory_is_the_least_of_the_machines_and_the_groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    there = memory()
    assert there is not None
    assert 0 <= there.free <= there.total
    monkeypatch.setattr(of_system, "_machine", lambda: Memory(1000, 2000))
    monkeypatch.setattr(of_system, "_GROUPS", tmp_path)
    lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    [path] = [line.split(":", 2)[2] for line in lines if line.split(":")[1] in ("", "memory")][-1:]
    second = write(tmp_path / path.lstrip("/"), memory__max="max", memory__current=700)
    (second / "memory.stat").write_text("anon 5\ninactive_file 100\n")
    assert memory() == Memory(1000, 2000)  # without a limit
    (second / "memory.max").write_text("900\n")
    found = memory()
    assert found in (Memory(300, 900), Memory(1000, 2000))  # the latter where groups are of the first version alone
    first = write(tmp_path / "memory", memory__limit_in_bytes=800, memory__usage_in_bytes=750)
    (first / "memory.stat").write_text("cache 5\ntotal_inactive_file 50\n")
    assert memory() in (Memory(100, 800), Memory(300, 900))
