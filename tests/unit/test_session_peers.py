"""What ranks tell each other before they communicate: three of them, as threads with one store."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from raytorch.errors import Cause, RemoteOpError, SessionError, UserError
from raytorch.session.rank_agreement import Peers

RANKS = 3


class Group:
    """A process group that only counts."""

    def __init__(self) -> None:
        self.number = self.left = 0

    def leave(self) -> bool:
        self.left += 1
        return True

    def renew(self, number: int) -> None:
        self.number = number


class Rank:
    """A rank that makes joint calls, and keeps how each of them ended."""

    def __init__(self, store: Any, rank: int) -> None:
        self.rank, self.group = rank, Group()
        self.peers = Peers(store, rank=rank, world_size=RANKS, group=self.group, timeout_s=20)
        self.ends: list[str] = []

    def call(self, function: Callable[["Rank"], None], *origin: int) -> None:
        try:
            with self.peers.joint_call(*origin or (0, 1, len(self.ends))):
                function(self)
            self.ends.append("done")
        except (RemoteOpError, SessionError, UserError, ValueError) as error:
            failure = error if isinstance(error, RemoteOpError) else failed(self.rank, str(error))
            self.ends.append(str(self.peers.fail(failure)))


def failed(rank: int, text: str) -> RemoteOpError:
    failure = RemoteOpError(text)
    failure.operation, failure.rank, failure.file, failure.line = "f", rank, "script.py", 7
    failure.instruction, failure.cause = (3, 4), Cause.HOST_MEMORY
    return failure


def ranks_that(work: Callable[[Rank], None]) -> list[Rank]:
    """Three ranks that have done some work at the same time."""
    store = HashStore()
    ranks = [Rank(store, rank) for rank in range(RANKS)]
    with ThreadPoolExecutor(RANKS) as pool:
        list(pool.map(work, ranks, timeout=60))
    return ranks


def ends(ranks: list[Rank]) -> list[str]:
    """How the calls ended, which is the same on every rank."""
    assert all(rank.ends == ranks[0].ends for rank in ranks)
    return ranks[0].ends


def test_every_rank_has_the_same_ends_whichever_fails_and_when() -> None:
    def step(rank: Rank) -> None:
        number = len(rank.ends)
        if number % 5 == 3 and rank.rank == 1:
            raise ValueError("before")
        rank.peers.agree("together")
        if number % 7 == 4 and rank.rank == 2:
            raise ValueError("between")
        rank.peers.agree("again")

    def work(rank: Rank) -> None:
        for _ in range(200):
            rank.call(step)

    ranks = ranks_that(work)
    expected = ["before" if n % 5 == 3 else "between" if n % 7 == 4 else "done" for n in range(200)]
    assert ends(ranks) == expected
    renewed = sum(end == "between" for end in expected)
    assert {(rank.group.number, rank.group.left) for rank in ranks} == {(renewed, renewed)}


def test_an_error_travels_whole() -> None:
    store = HashStore()
    first, second = (Rank(store, rank) for rank in (1, 0))
    for rank in (first, second):
        rank.peers._call = 5
    own = failed(1, "boom")
    assert first.peers.fail(own) is own
    told = second.peers.fail(failed(0, "another"))
    assert (str(told), told.rank, told.file, told.line) == ("boom", 1, "script.py", 7)
    assert (told.operation, told.instruction, told.cause) == ("f", (3, 4), Cause.HOST_MEMORY)


def test_ranks_that_are_about_to_do_different_things_are_all_told_what() -> None:
    def work(rank: Rank) -> None:
        rank.call(lambda rank: rank.peers.agree(f"sum of {rank.rank} rows"))
        rank.call(lambda rank: rank.peers.agree("sum"))

    every = ", ".join(f"rank {rank}: sum of {rank} rows" for rank in range(RANKS))
    ranks = ranks_that(work)
    assert ends(ranks) == [f"the workers disagree: {every}", "done"]
    assert [rank.group.left for rank in ranks] == [0] * RANKS


def test_ranks_at_instructions_of_different_clients_do_not_communicate() -> None:
    def work(rank: Rank) -> None:
        rank.call(lambda rank: rank.peers.agree("sum"), rank.rank % 2, 1, 0)

    (end,) = ends(ranks_that(work))
    assert "not at the same instruction: rank 0: [0, 1, 0], rank 1: [1, 1, 0], rank 2: [0, 1, 0]" in end


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_rank_that_passes_by_is_missed_at_once(goes_on: bool) -> None:
    def step(rank: Rank) -> None:
        rank.peers.agree("function")
        if rank.rank != 1:
            rank.peers.agree("sum")

    def work(rank: Rank) -> None:
        rank.call(step)
        if goes_on:
            rank.call(lambda rank: rank.peers.agree("next"))

    ranks = ranks_that(work)
    missed = "sum needs every rank, and rank 1 went on without it"
    assert [rank.ends[0] for rank in ranks] == [missed, "done", missed]
    assert [rank.ends[1:] for rank in ranks] == [["done"] * goes_on] * RANKS


def test_a_call_that_is_executed_on_one_rank_is_no_joint_call() -> None:
    rank = Rank(HashStore(), 2)
    with pytest.raises(SessionError, match="sum needs every rank, and this call is executed on rank 2 alone"):
        rank.peers.agree("sum")


def test_errors_do_not_stay_in_the_store() -> None:
    store = HashStore()
    ranks = [Rank(store, rank) for rank in range(RANKS)]

    def work(rank: Rank) -> None:
        for number in range(20):
            rank.call(raise_it if number % 2 else lambda rank: rank.peers.agree("together"))
        rank.call(lambda rank: rank.peers.agree("together"))

    with ThreadPoolExecutor(RANKS) as pool:
        list(pool.map(work, ranks, timeout=60))
    assert not any(store.check([f"error {call}"]) for call in range(30))


def raise_it(rank: Rank) -> None:
    raise ValueError("boom")
