"""Several clients of one session at once: the ranks take their programs in one order, so that no two collectives mix.

RAYTORCH_TEST_ROUNDS and RAYTORCH_TEST_REPEATS let it run for longer.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from session_clients import wait_until

from raytorch.distributed import collectives
from raytorch.session.session import Session

NAME = "shared"
ROUNDS = int(os.environ.get("RAYTORCH_TEST_ROUNDS", "60"))
REPEATS = int(os.environ.get("RAYTORCH_TEST_REPEATS", "1"))
PATIENCE_S = 120 + ROUNDS
"""Seconds within which all rounds are done, on however busy a machine."""
ELEMENTS = 64
LARGE = 1 << 17


pytestmark = pytest.mark.timeout(300 + 2 * PATIENCE_S)


@pytest.fixture
def session(opened: Session) -> Session:
    return opened


def reduce_in_rounds(session: Session, first: int, rounds: int) -> list[str]:
    """Sum ``first``, ``first + 1``, ... over the ranks, each beside work of its own; answers with what was wrong."""
    wrong = []
    for value in range(first, first + rounds):
        mine = session.full((ELEMENTS,), float(value))
        collectives.all_reduce(mine)
        for rank, found in enumerate(mine.fetch(all=True)):
            if not torch.equal(found, torch.full((ELEMENTS,), 2.0 * value)):
                wrong.append(f"{value} on rank {rank}: {found.tolist()[:4]}")
    return wrong


GUEST = f"""
import sys
sys.path[:0] = {sys.path!r}
import raytorch
from session.test_session_clients import NAME, reduce_in_rounds
with raytorch.connect(name=NAME) as session:
    print("joined", flush=True)
    sys.stdin.readline()
    for line in reduce_in_rounds(session, int(sys.argv[1]), int(sys.argv[2])):
        print(line)
    print("done", flush=True)
"""


@contextmanager
def guest(cluster: str, first: int, rounds: int) -> Iterator[subprocess.Popen[str]]:
    """A process that has joined the session, and reduces once it is told to."""
    environment = os.environ | {"RAY_ADDRESS": cluster}
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", GUEST, str(first), str(rounds)]
    with subprocess.Popen(command, env=environment, text=True, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "joined\n"
            yield process
        finally:
            process.kill()


def start(process: subprocess.Popen[str]) -> None:
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()


def is_shared(session: Session) -> Any:
    transport: Any = session._transport
    return transport._is_shared


@pytest.mark.parametrize("repeat", range(REPEATS))
def test_two_clients_in_collectives_at_once_get_their_own_sums(session: Session, cluster: str, repeat: int) -> None:
    with guest(cluster, 1_000_000, ROUNDS) as other:
        start(other)
        mine = reduce_in_rounds(session, 1 + repeat, ROUNDS)
        theirs, errors = other.communicate(timeout=PATIENCE_S)
    assert (mine, theirs) == ([], "done\n"), errors[-3000:]


def test_a_client_that_is_killed_in_the_middle_of_collectives_stops_nobody(session: Session, cluster: str) -> None:
    with guest(cluster, 1_000_000, 1_000_000) as dying, guest(cluster, 2_000_000, ROUNDS) as staying:
        start(dying)
        start(staying)
        assert reduce_in_rounds(session, 1, ROUNDS // 2) == []
        dying.send_signal(signal.SIGKILL)
        assert reduce_in_rounds(session, 1, ROUNDS // 2) == []
        theirs, errors = staying.communicate(timeout=PATIENCE_S)
    assert theirs == "done\n", errors[-3000:]


def test_large_data_of_a_client_reaches_all_ranks_while_another_works(session: Session, cluster: str) -> None:
    local = torch.randn(2, LARGE)
    with guest(cluster, 1_000_000, ROUNDS) as other:
        start(other)
        for _ in range(3):
            assert torch.equal(torch.cat(session.scatter(local).fetch(all=True)), local)
            assert torch.equal(session.tensor(local[1]).fetch(all=True)[1], local[1])
        theirs, errors = other.communicate(timeout=PATIENCE_S)
    assert theirs == "done\n", errors[-3000:]


def test_a_client_that_is_alone_again_sends_to_the_workers_itself(session: Session, cluster: str) -> None:
    wait_until(lambda: not is_shared(session), 30)
    with guest(cluster, 1_000_000, 1) as other:
        wait_until(lambda: is_shared(session), 30)
        start(other)
        assert other.communicate(timeout=60)[0] == "done\n"
    for value in range(1, ROUNDS):  # among them those that meet the change
        assert reduce_in_rounds(session, value, 1) == []
        if not is_shared(session):
            break
    wait_until(lambda: not is_shared(session), 30)
    assert reduce_in_rounds(session, 1, 5) == []
