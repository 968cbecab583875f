"""Whole files on the node's disk, which processes share: the bound, who goes first, and what a killed one leaves."""

import mmap
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import pytest

from raytorch.errors import StorageError
from raytorch.sources import node_cache
from raytorch.sources.node_cache import NodeCache, NoRoomError

SIZE = 100_000


def key(number: int) -> str:
    return f"{number:032x}"


def content(number: int) -> bytes:
    return bytes([number]) * SIZE


class Files:
    """Files that are opened through a cache, and which of them were fetched."""

    def __init__(self, folder: Path, room: int) -> None:
        self.cache, self.folder = NodeCache(folder, room * SIZE), folder
        self.fetched: list[int] = []

    def open(self, number: int, wait_s: float = 0) -> BinaryIO:
        def fetch(file: BinaryIO) -> None:
            self.fetched.append(number)
            file.write(content(number))

        return self.cache.open(key(number), SIZE, fetch, f"s3://bucket/{number}", wait_s)

    def use(self, *numbers: int, wait_s: float = 0) -> None:
        for number in numbers:
            with self.open(number, wait_s) as file:
                assert file.read() == content(number)

    @property
    def there(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir() if path.name != "lock")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_a_file_is_fetched_once_and_its_folder_is_this_users_alone(folder: Path) -> None:
    files = Files(folder, 3)
    files.use(1, 1, 2, 1)
    Files(folder, 3).use(2)
    assert files.fetched == [1, 2]
    assert [oct(path.stat().st_mode)[-3:] for path in (folder, folder / key(1))] == ["700", "600"]


def test_the_least_recently_used_make_room(folder: Path) -> None:
    files = Files(folder, 3)
    files.use(1, 2, 3, 1, 4)
    assert files.there == [key(1), key(3), key(4)]
    files.use(5)
    assert files.there == [key(1), key(4), key(5)]


def test_what_is_open_or_mapped_stays_and_counts(folder: Path) -> None:
    files = Files(folder, 2)
    opened = files.open(1)
    mapped = mmap.mmap(opened.fileno(), SIZE, prot=mmap.PROT_READ)
    opened.close()
    files.use(2, 3, 4)
    with files.open(5), pytest.raises(NoRoomError) as caught:
        files.open(6)
    assert files.there == [key(1), key(5)]  # none was removed in vain
    assert str(caught.value) == (
        f"s3://bucket/6: there is no room for its 100,000 bytes in the cache of this node ({folder}), which may hold "
        "200,000: other files in it are open; raise data.cache_size"
    )
    mapped.close()
    files.use(6, 7)
    assert files.there == [key(6), key(7)]


def test_room_that_others_have_is_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Files(folder, 1)
    opened = files.open(1)
    clock = SimpleNamespace(monotonic=time.monotonic, time_ns=time.time_ns, sleep=lambda seconds: opened.close())
    monkeypatch.setattr(node_cache, "time", clock)  # that of this file alone: other threads sleep too
    with files.open(2, wait_s=60) as file:
        assert file.read() == content(2)


def test_a_file_larger_than_the_bound_is_refused(folder: Path) -> None:
    files = Files(folder, 2)
    files.use(1)
    with pytest.raises(NoRoomError, match=r"^s3://b/x: its 200,001 bytes are more than .* may hold, 200,000; raise"):
        files.cache.open(key(9), 2 * SIZE + 1, lambda file: None, "s3://b/x")
    assert files.there == [key(1)]


def test_without_a_bound_half_of_the_room_of_the_disk_is_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Files(folder, 1)
    files.cache = NodeCache(folder)
    files.use(1, 2)
    facts = os.statvfs(folder)
    free = os.statvfs_result((*facts[:1], 1, *facts[2:4], 3 * SIZE, *facts[5:]))
    monkeypatch.setattr(node_cache.os, "statvfs", lambda path: free)
    files.use(3)  # 300,000 bytes are free, and 200,000 held
    assert files.there == [key(2), key(3)]


@pytest.mark.parametrize("error", [OSError("broken"), KeyboardInterrupt()])
def test_a_download_that_fails_leaves_nothing(folder: Path, error: BaseException) -> None:
    files = Files(folder, 1)

    def fetch(file: BinaryIO) -> None:
        file.write(b"x" * (SIZE // 2))
        assert files.there == [f"{key(1)}.part"]
        raise error

    with pytest.raises(type(error)):
        files.cache.open(key(1), SIZE, fetch, "x")
    assert files.there == []
    files.use(1)


def test_a_disk_that_is_full_is_told(folder: Path) -> None:
    def fetch(file: BinaryIO) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match=r"/cache: the disk is full; lower data.cache_size$"):
        NodeCache(folder, SIZE).open(key(1), SIZE, fetch, "x")


@pytest.mark.parametrize("what", ["owner", "mode", "file"])
def test_a_folder_that_others_may_write_to_is_refused(folder: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.touch() if what == "file" else folder.mkdir()
    folder.chmod(0o777 if what == "mode" else 0o700)
    if what == "owner":
        monkeypatch.setattr(node_cache.os, "getuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(StorageError, match=r"is no folder that this user alone may write to; set data.cache_folder to"):
        NodeCache(folder, 1)


HOLD = """
    import sys
    from pathlib import Path
    from raytorch.sources.node_cache import NodeCache

    def fetch(file):
        file.write(b"x" * 50_000)
        file.flush()
        print("half", flush=True)
        sys.stdin.read()
        file.write(b"x" * 50_000)

    NodeCache(Path(sys.argv[1]), 100_000).open(sys.argv[2], 100_000, fetch, "x")
"""


def started(code: str, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def test_what_a_killed_download_leaves_is_removed_by_the_next(folder: Path) -> None:
    files = Files(folder, 1)
    for number in (1, 2):  # the same file, and another
        with started(HOLD, str(folder), key(1)) as other:
            assert other.stdout
            assert other.stdout.readline() == b"half\n"
            assert files.there == [f"{key(1)}.part"]
            with pytest.raises(NoRoomError):
                files.open(2)
            waiting = threading.Thread(target=files.use, args=(number,), kwargs={"wait_s": 60})
            waiting.start()
            assert files.fetched == list(range(1, number))  # the room is taken, until it is killed
            other.kill()
        waiting.join()
        assert files.there == [key(number)]
        (folder / key(number)).unlink()
    assert files.fetched == [1, 2]


def test_of_two_that_want_a_file_one_fetches_it(folder: Path) -> None:
    files = Files(folder, 1)
    with started(HOLD, str(folder), key(1)) as other:
        assert other.stdout
        assert other.stdout.readline() == b"half\n"
        found: list[bytes] = []

        def read() -> None:
            with files.open(1) as file:
                found.append(file.read())

        waiting = threading.Thread(target=read)
        waiting.start()
        other.communicate(b"")
    waiting.join()
    assert found == [b"x" * SIZE]
    assert files.fetched == []


FILES, ROOM = 8, 4
USE = """
    import random, sys
    from pathlib import Path
    from raytorch.sources.node_cache import NodeCache

    folder, seed, files, room, size = Path(sys.argv[1]), *map(int, sys.argv[2:])
    cache, order = NodeCache(folder, room * size), random.Random(seed)
    fetched = 0
    for _ in range(25):
        number = order.randrange(files)
        def fetch(file):
            global fetched
            fetched += 1
            for _ in range(10):
                file.write(bytes([number]) * (size // 10))
                file.flush()
        with cache.open(f"{number:032x}", size, fetch, "x") as file:
            assert file.read() == bytes([number]) * size
    print(fetched)
"""


def test_the_bound_holds_at_every_moment_for_processes_that_use_twice_as_much(folder: Path) -> None:
    numbers = [str(number) for number in (FILES, ROOM, SIZE)]
    users = [started(USE, str(folder), str(seed), *numbers) for seed in range(4)]
    most = 0
    while any(user.poll() is None for user in users):
        held = {}
        for entry in os.scandir(folder) if folder.exists() else ():
            try:
                facts = entry.stat()
            except FileNotFoundError:
                continue
            held[facts.st_ino] = facts.st_size  # one that was renamed meanwhile is listed twice
        most = max(most, sum(held.values()))
    fetched = [int(user.communicate()[0]) for user in users]
    assert [user.returncode for user in users] == [0] * 4
    assert ROOM // 2 * SIZE < most <= ROOM * SIZE
    assert 4 * 25 > sum(fetched) > FILES
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == ROOM + 1
    assert not [name for name in names if name.endswith(".part")]
