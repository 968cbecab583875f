"""The processes that readers are: whose code they find, and that nothing is left of them."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from ended import await_end

from raytorch.config.file import from_data
from raytorch.datasets import TrainLoader, load_split
from raytorch.datasets.own import OwnDataset
from raytorch.datasets.readers import Readers
from raytorch.errors import ConfigError, ReaderDiedError
from raytorch.system.processes import children

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")


def read(data: Any, readers: int = 2, samples: int = 8) -> list[Any]:
    """The batches of an epoch."""
    loader = TrainLoader(OwnDataset(data, CPU, readers=readers), batch_size=samples)
    return [part.content for step in loader.remaining() for part in step]


# -- whose code they find ----------------------------------------------------------------------------------------------

TABLE = """
from shapes.sizes import WIDTH

class Table:
    facts = {}

    def __init__(self, split: str):
        self.rows = [number * WIDTH for number in range(8)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        from shapes import later
        return self.rows[index] + later.MORE
"""


def test_a_projects_own_modules_are_those_that_the_run_has_and_not_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"table.py": TABLE, "shapes/__init__.py": "", "shapes/sizes.py": "WIDTH = 3", "shapes/later.py": "MORE = 1"}
    (tmp_path / "shapes").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    config = from_data({"epochs": 1, "data": {"name": "table.py:Table", "readers": 2}, "model": "mlp"})
    for name in files:
        (tmp_path / name).write_text("raise SystemExit", encoding="utf-8")
    loader = TrainLoader(load_split(config, "train", CPU), batch_size=8)
    [[batch]] = loader.remaining()
    assert sorted(batch.content.tolist()) == [number * 3 + 1 for number in range(8)]


def test_a_class_that_is_in_no_module_is_sent_whole() -> None:
    step = 5

    class Local:
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> int:
            return index * step

    [batch] = read(Local())
    assert sorted(batch.tolist()) == list(range(0, 40, 5))


SCRIPT = """
import torch
from typing import NamedTuple
from raytorch.datasets import TrainLoader
from raytorch.datasets.own import OwnDataset
from raytorch.system.processes import children

print("imported")

class Pair(NamedTuple):
    left: torch.Tensor
    right: list

class Missing(Exception):
    pass

class Rows:
    def __init__(self, missing):
        self.missing = missing

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == self.missing:
            raise Missing(index)
        return index

    def collate(self, samples):
        return Pair(torch.tensor(samples), sorted(samples))

def batch(missing):
    [[batch]] = TrainLoader(OwnDataset(Rows(missing), torch.device("cpu"), readers=1), batch_size=4).remaining()
    return batch.content

if __name__ == "__main__":
    assert type(batch(None)) is Pair
    try:
        batch(3)
    except Missing as error:
        print(batch(None).right, error)
    print(*children())
"""


def test_classes_of_a_script_are_its_own_again_and_it_is_not_run_once_more(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    ran = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    *lines, server = ran.stdout.splitlines()
    assert (lines, ran.stderr) == (["imported", "[0, 1, 2, 3] 3"], "")
    assert not is_there(int(server))  # it has been waited for


class Open:
    """A data set that holds what a process cannot give another."""

    def __init__(self) -> None:
        self.held: Any = threading.Lock()

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        assert self.held is None
        return index


class Closed(Open):
    def __getstate__(self) -> dict[str, Any]:
        return {"held": None}


class Unhappy(Closed):
    def __setstate__(self, state: dict[str, Any]) -> None:
        raise KeyError("held")


def test_a_data_set_that_cannot_be_sent_is_refused_with_what_to_do() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^data.readers: Open cannot be sent to readers: TypeError: cannot pickle '_thread.lock' object; give it "
        r"__getstate__ that leaves out what is open, or readers: 0$",
    ):
        OwnDataset(Open(), CPU, readers=1)
    assert sorted(read(Closed())[0].tolist()) == list(range(8))


def test_a_data_set_that_cannot_be_unpacked_is_told_with_the_place() -> None:
    with pytest.raises(
        ConfigError, match=r"^data.readers: Unhappy cannot be sent to readers: KeyError: 'held'"
    ) as told:
        read(Unhappy())
    frame = told.value.__cause__.__traceback__  # type: ignore[union-attr]
    while frame and frame.tb_next:
        frame = frame.tb_next
    assert frame
    assert frame.tb_frame.f_code.co_name == "__setstate__"


# -- how they end ------------------------------------------------------------------------------------------------------


def test_none_has_a_second_thread_when_it_forks() -> None:
    [(pid, parent)] = Readers(lambda request: (os.getpid(), os.getppid()), 1).read([None])
    for process in (pid, parent, parent_of(parent)):
        assert "Threads:\t1\n" in Path(f"/proc/{process}/status").read_text(encoding="utf-8")


class Processes(NamedTuple):
    """Those of a data set with a reader."""

    reader: int
    keeper: int
    server: int


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])


def is_there(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()  # also if nobody has waited for it


def begun(readers: Readers) -> tuple[Processes, Iterator[Any]]:
    """The processes of :func:`endless`, which now reads and does not end."""
    answers = readers.read(range(100))
    pid = next(answers)
    return Processes(pid, parent_of(pid), parent_of(parent_of(pid))), answers


def endless(request: Any) -> int:
    if request > 0:
        ctypes.CDLL(None).sleep(100_000)
    return os.getpid()


@pytest.mark.parametrize(
    ("killed", "message"),
    [
        (0, r"reader 1 of 1 died of SIGKILL while it read a batch; somebody killed it, or the machine has no memory"),
        (
            1,
            r"the process that readers come from died of SIGKILL while it kept the data set for them; somebody",
        ),
    ],
    ids=["reader", "keeper"],
)
def test_one_that_is_killed_is_told_and_leaves_nothing(killed: int, message: str) -> None:
    readers = Readers(endless, 1)
    processes, answers = begun(readers)
    os.kill(processes[killed], signal.SIGKILL)
    for _ in range(2):  # and again for the one who asks again
        with pytest.raises(ReaderDiedError, match=f"^data.readers: {message}"):
            next(answers)
        answers = readers.read(range(2))
    await_end(processes[killed], processes.reader)
    assert [value > 0 for value in Readers(endless, 1).read([0])] == [True]  # another data set can be read


def test_a_server_that_is_killed_is_told_also_before_it_has_started() -> None:
    message = r"^data.readers: the server of readers died of SIGKILL while it served them; somebody killed it"
    readers = Readers(endless, 1)
    processes, answers = begun(readers)
    os.kill(processes.server, signal.SIGKILL)
    with pytest.raises(ReaderDiedError, match=message):
        next(answers)
    await_end(processes.reader, processes.keeper)
    late = Readers(endless, 1)
    [server] = [pid for pid in children() if b"reader_server" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert server != processes.server
    os.kill(server, signal.SIGKILL)
    with pytest.raises(ReaderDiedError, match=message):
        list(late.read([0]))
    assert [value > 0 for value in Readers(endless, 1).read([0])] == [True]


def test_they_end_with_the_data_set_also_in_the_middle_of_a_read() -> None:
    readers = Readers(endless, 1)
    processes, answers = begun(readers)
    del readers, answers
    await_end(processes.reader, processes.keeper)
    while is_there(processes.reader) or is_there(processes.keeper):  # which is waited for at once
        os.sched_yield()
    assert is_there(processes.server)  # for the next data set


WORKER = """
import ctypes, os, signal, sys, threading
from raytorch.datasets.readers import Readers

def endless(request):
    if request > 0:
        ctypes.CDLL(None).sleep(100_000)
    return os.getpid(), os.getppid()

def start():
    made.extend(Readers(endless, 1) for _ in range(2))

made = []
thread = threading.Thread(target=start)
thread.start()
thread.join()  # what it has started does not end with it
reading = [readers.read(range(100)) for readers in made]
print(*(pid for answers in reading for pid in next(answers)), flush=True)
sys.stdin.readline()
if not os.fork():  # a process that has its lines as well, and stays
    os.closerange(0, 3)
    ctypes.CDLL(None).pause()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_they_end_with_a_worker_that_is_killed_in_the_middle_of_a_read(tmp_path: Path) -> None:
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        start_new_session=True,
    )
    assert worker.stdout
    pids = [int(pid) for pid in worker.stdout.readline().split()]
    assert len(pids) == 4
    pids.append(parent_of(pids[1]))
    assert all(is_there(pid) for pid in pids)
    worker.communicate("end\n")
    try:
        await_end(*pids)
    finally:
        os.killpg(worker.pid, signal.SIGKILL)  # the one that it has forked
    assert list(tmp_path.iterdir()) == []


def test_readers_and_server_leave_ctrl_c_to_the_worker() -> None:
    readers = Readers(endless, 1)
    processes, _ = begun(readers)
    for pid in processes:
        os.kill(pid, signal.SIGINT)
        assert os.getpgid(pid) != os.getpgid(0)
    assert list(Readers(lambda request: parent_of(os.getppid()), 1).read([0])) == [processes.server]
    assert is_there(processes.reader)
