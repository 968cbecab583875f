"""A rank that fails where the others count on it: all of them raise its own error at once, and the session goes on.

RAYTORCH_TEST_REPEATS lets it run for longer, RAYTORCH_TEST_WITHIN_S be stricter.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import cloudpickle
import pytest
import torch
import torch.distributed as dist
from in_processes import session_of_processes
from torch import nn
from torch.nn import functional as F

from raytorch import distributed
from raytorch.distributed import collectives
from raytorch.errors import RemoteOpError, SessionError
from raytorch.session import worker_functions
from raytorch.session.remote_tensor import RemoteTensor
from raytorch.session.session import Session

cloudpickle.register_pickle_by_value(sys.modules[__name__])

REPEATS = int(os.environ.get("RAYTORCH_TEST_REPEATS", "1"))
WITHIN_S = float(os.environ.get("RAYTORCH_TEST_WITHIN_S", "20"))
"""Seconds within which all ranks know; those that wait in vain would do so for 60."""


@pytest.fixture(scope="module")
def opened() -> Iterator[Session]:
    with session_of_processes(2) as session:
        session.ddp(session.module(nn.Linear, 1, 1))  # the first imports much
        yield session


@pytest.fixture
def session(opened: Session) -> Iterator[Session]:
    """The one session of these tests: in each it works before, and goes on afterwards."""
    assert collectives.all_reduce(opened.ones(1)).item(all=True) == [opened.workers] * opened.workers
    yield opened
    assert collectives.all_reduce(opened.ones(1)).item(all=True) == [opened.workers] * opened.workers
    assert opened.run(reduce_by_torch) == opened.workers
    opened.barrier()
    opened.synchronize()


def reduce_by_torch() -> float:
    total = torch.ones(1)
    dist.all_reduce(total)
    return total.item()


def per_rank(session: Session, *values: Any) -> Any:
    """A tensor whose value on rank 1 is the second one, and elsewhere the first."""
    rows = [values[rank == 1] for rank in range(session.workers)]
    return session.scatter(torch.tensor(rows))[0]


# -- what fails on rank 1 alone ----------------------------------------------------------------------------------------


def index_out_of_range(session: Session) -> Any:
    table = session.arange(4.0)
    return collectives.all_reduce(table[per_rank(session, 0, 7)])


def index_out_of_range_in_all_gather(session: Session) -> Any:
    table = session.arange(4.0)
    return collectives.all_gather(table[per_rank(session, 0, 7)])


def bad_label_under_ddp(session: Session) -> Any:
    ddp = session.ddp(session.module(nn.Linear, 3, 2))
    labels = per_rank(session, [0, 1], [0, 9])
    F.cross_entropy(ddp(session.ones(2, 3)), labels).backward()
    weight, _ = ddp.parameters()
    return weight.grad * 1


def raises_on_one_rank(session: Session) -> Any:
    def function() -> float:
        if dist.get_rank() == 1:
            raise ValueError("not this rank")
        return 1.0

    return session.run(function)


def raises_before_a_collective(session: Session) -> Any:
    def function() -> Any:
        if dist.get_rank() == 1:
            raise ValueError("not this rank")
        return collectives.all_reduce(torch.ones(1))

    return session.run(function)


def raises_before_a_collective_of_torch(session: Session) -> Any:
    def function() -> float:
        dist.all_reduce(torch.ones(1))
        if dist.get_rank() == 1:
            raise ValueError("not this rank")
        return reduce_by_torch()

    return session.run(function)


def raises_where_a_default_argument_holds_the_group(session: Session) -> Any:
    def function() -> None:
        def reduce(group: Any = dist.group.WORLD, *, named: Any = dist.group.WORLD) -> None:
            dist.all_reduce(torch.ones(1), group=group or named)

        if not hasattr(dist, "kept"):
            dist.kept = reduce  # type: ignore[attr-defined]
        dist.kept()  # type: ignore[attr-defined]
        if dist.get_rank() == 1:
            raise ValueError("not this rank")
        dist.kept()  # type: ignore[attr-defined]

    return session.run(function)


def raises_before_a_barrier(session: Session) -> Any:
    def function() -> None:
        if dist.get_rank() == 1:
            raise ValueError("not this rank")
        distributed.barrier()

    return session.run(function)


def raises_in_the_backward_of_ddp(session: Session) -> Any:
    class Stubborn(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return x * 1

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            if dist.get_rank() == 1:
                raise ValueError("not this rank")
            return grad

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.below, self.above = nn.Linear(3, 3), nn.Linear(3, 1)

        def forward(self, x: Any) -> Any:
            return self.above(Stubborn.apply(self.below(x)))

    ddp = session.ddp(session.module(Net))
    ddp(session.ones(2, 3)).sum().backward()
    return next(iter(ddp.parameters())).grad * 1


def argument_that_one_rank_lacks(session: Session) -> Any:
    lacking = session.arange(4.0)[per_rank(session, 0, 7)]
    return session.run(lambda tensor: collectives.all_reduce(tensor + 1), lacking)


def object_that_one_rank_lacks(session: Session) -> Any:
    def factory() -> nn.Module:
        if dist.get_rank() == 1:
            raise ValueError("not this rank")
        return nn.Linear(2, 2)

    ddp = session.ddp(session.module(factory))
    return ddp(session.ones(2)) * 1


CASES: list[tuple[Callable[[Session], Any], str, str]] = [
    (index_out_of_range, "__getitem__", "IndexError"),
    (index_out_of_range_in_all_gather, "__getitem__", "IndexError"),
    (bad_label_under_ddp, "cross_entropy", "IndexError: Target 9 is out of bounds"),
    (raises_on_one_rank, "session.call", "ValueError: not this rank"),
    (raises_before_a_collective, "session.call", "ValueError: not this rank"),
    (raises_before_a_collective_of_torch, "session.call", "ValueError: not this rank"),
    (raises_where_a_default_argument_holds_the_group, "session.call", "ValueError: not this rank"),
    (raises_before_a_barrier, "session.call", "ValueError: not this rank"),
    (raises_in_the_backward_of_ddp, "backward", "ValueError: not this rank"),
    (argument_that_one_rank_lacks, "__getitem__", "IndexError"),
    (object_that_one_rank_lacks, "session.create", "ValueError: not this rank"),
]


@pytest.mark.parametrize("repeat", range(REPEATS))
@pytest.mark.parametrize(("case", "operation", "reason"), CASES, ids=[case[0].__name__ for case in CASES])
def test_all_ranks_raise_the_error_of_the_one_that_failed_and_go_on(
    session: Session, case: Callable[[Session], Any], operation: str, reason: str, repeat: int
) -> None:
    def see_it_through() -> None:
        result = case(session)
        if isinstance(result, RemoteTensor):
            result.fetch(all=True)
        session.synchronize()

    begun = time.monotonic()
    with pytest.raises(RemoteOpError, match=rf"(?s){operation}\(.*failed on rank 1.*{reason}") as caught:
        see_it_through()
    assert time.monotonic() - begun < WITHIN_S
    assert (caught.value.rank, caught.value.file) == (1, __file__)
    session.synchronize()  # it is told once


def test_every_rank_has_the_error_of_the_one_that_failed(session: Session) -> None:
    every = index_out_of_range_in_all_gather(session)
    for rank in range(session.workers):
        with pytest.raises(RemoteOpError, match=r"__getitem__\(.*failed on rank 1"):
            session._recorder.ask(worker_functions.fetch, every, rank=rank)


def test_ddp_goes_on_with_its_weights_and_averages_after_a_failure(session: Session) -> None:
    module = session.module(nn.Linear, 2, 1, bias=False)
    ddp = session.ddp(module)
    (weight,) = ddp.parameters()
    optimizer = session.optimizer("sgd", ddp.parameters(), lr=0.5)
    data = session.scatter(torch.arange(2.0 * session.workers).reshape(session.workers, 2))
    mean = torch.arange(2.0 * session.workers).reshape(session.workers, 2).mean(0)
    expected = weight.fetch()
    for _ in range(3):
        with pytest.raises(RemoteOpError, match="not this rank"):
            raises_before_a_collective_of_torch(session)
        optimizer.zero_grad()
        ddp(data).sum().backward()
        optimizer.step()
        expected = expected - 0.5 * mean
        for found in weight.fetch(all=True):
            torch.testing.assert_close(found.detach(), expected.detach())


def test_what_is_on_one_rank_alone_is_refused_where_all_are_needed(session: Session) -> None:
    alone = session.rank(1)
    for refused in (
        lambda: collectives.all_reduce(alone.ones(1)),
        lambda: collectives.all_gather(alone.ones(1)),
        lambda: collectives.broadcast(alone.ones(1), 1),
        lambda: collectives.reduce_scatter(alone.ones(session.workers)),
        lambda: session.ddp(alone.module(nn.Linear, 2, 2)),
    ):
        with pytest.raises(SessionError, match="needs every rank, and its argument is on rank 1 alone"):
            refused()
    for function in (lambda: collectives.all_reduce(torch.ones(1)), distributed.barrier):
        with pytest.raises(RemoteOpError, match="needs every rank, and this call is executed on rank 1 alone"):
            alone.run(function)
    assert alone.ones(2).sum().item() == 2


def test_a_collective_that_one_rank_passes_by_is_an_error_at_once(session: Session) -> None:
    def function() -> float:
        return 0.0 if dist.get_rank() == 1 else collectives.all_reduce(torch.ones(1)).item()

    with pytest.raises(
        RemoteOpError, match=r"all_reduce\(sum\) of float32 \(1,\) needs every rank, and rank 1 went on"
    ):
        session.run(function)


def test_work_of_one_rank_waits_for_no_other(session: Session) -> None:
    def wait() -> None:
        time.sleep(3)

    session._recorder.do(worker_functions.call, wait, rank=1)
    begun = time.monotonic()
    assert session.rank(0).run(os.getpid) > 0
    assert session.rank(0).ones(2).sum().item() == 2
    assert time.monotonic() - begun < 2


def test_what_a_collective_refuses_on_all_ranks_needs_no_new_group(session: Session) -> None:
    def group() -> int:
        return id(dist.group.WORLD)

    before = session.run(group)
    with pytest.raises(RemoteOpError, match="op must be one of sum, mean"):
        collectives.all_gather(collectives.all_reduce(session.ones(1), "average")).fetch()
    with pytest.raises(RemoteOpError, match=r"disagree: rank 0: .*float32\[2\]\), rank 1: .*float32\[1\]\)"):
        collectives.all_gather(session.scatter(torch.ones(3))[:2]).fetch()
    assert session.run(group) == before
