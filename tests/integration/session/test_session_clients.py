"""Several clients of one session at once: the ranks take their programs in one order, so that no two collectives mix.

RAYTORCH_TEST_ROUNDS and RAYTORCH_TEST_REPEATS let it run for longer.
"""

import os
from typing import Any

import pytest
import torch
from session_clients import guest, wait_until

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


def is_shared(session: Session) -> Any:
    transport: Any = session._transport
    return transport._is_shared


@pytest.mark.parametrize("repeat", range(REPEATS))
def test_two_clients_in_collectives_at_once_get_their_own_sums(session: Session, cluster: str, repeat: int) -> None:
    with guest(cluster, NAME, reduce_in_rounds) as other:
        other.ask(1_000_000, ROUNDS)
        mine = reduce_in_rounds(session, 1 + repeat, ROUNDS)
        assert (mine, other.answer(PATIENCE_S)) == ([], [])


def test_a_client_that_is_killed_in_the_middle_of_collectives_stops_nobody(session: Session, cluster: str) -> None:
    with guest(cluster, NAME, reduce_in_rounds) as dying, guest(cluster, NAME, reduce_in_rounds) as staying:
        dying.ask(1_000_000, 1_000_000)
        staying.ask(2_000_000, ROUNDS)
        assert reduce_in_rounds(session, 1, ROUNDS // 2) == []
        dying.kill()
        assert reduce_in_rounds(session, 1, ROUNDS // 2) == []
        assert staying.answer(PATIENCE_S) == []


def test_large_data_of_a_client_reaches_all_ranks_while_another_works(session: Session, cluster: str) -> None:
    local = torch.randn(2, LARGE)
    with guest(cluster, NAME, reduce_in_rounds) as other:
        other.ask(1_000_000, ROUNDS)
        for _ in range(3):
            assert torch.equal(torch.cat(session.scatter(local).fetch(all=True)), local)
            assert torch.equal(session.tensor(local[1]).fetch(all=True)[1], local[1])
        assert other.answer(PATIENCE_S) == []


def test_a_client_that_is_alone_again_sends_to_the_workers_itself(session: Session, cluster: str) -> None:
    wait_until(lambda: not is_shared(session), 30)
    with guest(cluster, NAME, reduce_in_rounds) as other:
        wait_until(lambda: is_shared(session), 30)
        other.ask(1_000_000, 1)
        assert other.answer() == []
        other.leave()
    for value in range(1, ROUNDS):  # among them those that meet the change
        assert reduce_in_rounds(session, value, 1) == []
        if not is_shared(session):
            break
    wait_until(lambda: not is_shared(session), 30)
    assert reduce_in_rounds(session, 1, 5) == []
