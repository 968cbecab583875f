"""Sessions on a real Ray: two workers, their process group, several clients, and what they leave behind."""

import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import ray
import torch
from session_clients import guest, wait_until
from torch import Tensor, nn
from torch.nn import functional as F

import raytorch
from raytorch import distributed
from raytorch.distributed import collectives
from raytorch.errors import HandleError, RemoteOpError, SessionError, SessionLostError
from raytorch.session.session import Session

cloudpickle.register_pickle_by_value(sys.modules[__name__])

NAME = "shared"
HANDLES = int(os.environ.get("RAYTORCH_TEST_HANDLES", "1000"))
"""Handles of each of the threads; the suite is content with few."""
OPERATIONS = int(os.environ.get("RAYTORCH_TEST_OPERATIONS", "200000"))


@pytest.fixture
def session(opened: Session) -> Iterator[Session]:
    """The one session of these tests: each finds nothing in it, and leaves nothing."""
    yield opened
    wait_until(lambda: opened.handles() == [], 10)


# -- printing ----------------------------------------------------------------------------------------------------------


def greet() -> None:
    print("hello")
    warnings.warn("look out", stacklevel=1)


def test_what_workers_print_is_shown_once_with_the_rank(session: Session, capfd: pytest.CaptureFixture[str]) -> None:
    session.run(greet)
    session.synchronize()
    shown = capfd.readouterr()
    assert sorted(shown.out.splitlines()) == ["(rank 0) hello", "(rank 1) hello"]
    assert [shown.err.count(f"(rank {rank}) ") > 0 for rank in (0, 1)] == [True, True]
    assert shown.err.count("UserWarning: look out") == 2


def test_wrapping_a_module_prints_nothing(session: Session, capfd: pytest.CaptureFixture[str]) -> None:
    session.ddp(session.module(nn.Linear, 1, 1))
    session.synchronize()
    assert capfd.readouterr() == ("", "")


# -- saving ------------------------------------------------------------------------------------------------------------


def test_a_data_parallel_module_is_restored_with_each_ranks_own(session: Session, tmp_path: Path) -> None:
    net = session.module(nn.BatchNorm1d, 2)
    ddp = session.ddp(net)
    optimizer = session.optimizer("sgd", ddp.parameters(), lr=1.0)
    data = session.scatter(torch.arange(8.0).reshape(4, 2))
    ddp(data).sum().backward()
    optimizer.step()
    means = net.get("running_mean").fetch(all=True)
    state = net.state_dict()
    handles = net.handle, ddp.handle
    session.save(tmp_path / "saved")
    del net, ddp, optimizer, data
    wait_until(lambda: session.handles() == [], 10)
    session.restore(tmp_path / "saved")
    kinds = [(found["handle"], found["kind"]) for found in session.handles()]
    held = {handle: session.get(handle, kind) for handle, kind in kinds}
    net, ddp = (held[handle] for handle in handles)
    assert not torch.equal(*means)
    assert all(map(torch.equal, net.get("running_mean").fetch(all=True), means))
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    ddp(session.scatter(torch.arange(4.0).reshape(4, 1) @ torch.ones(1, 2))).square().sum().backward()
    first, second = net.get("weight.grad").fetch(all=True)
    assert torch.equal(first, second)


# -- training over the ranks -------------------------------------------------------------------------------------------


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))


def batch(rows: int = 32) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(1)), torch.arange(rows) % 3


def test_scattered_gradients_that_are_averaged_are_those_of_the_joined_batch(session: Session) -> None:
    data, target = batch()
    weight = torch.randn(3, 6)
    mine = session.tensor(weight, requires_grad=True)
    F.cross_entropy(session.scatter(data) @ mine.T, session.scatter(target)).backward()
    each = mine.grad.fetch(all=True)
    collectives.all_reduce(mine.grad, "mean")
    theirs = weight.clone().requires_grad_()
    F.cross_entropy(data @ theirs.T, target).backward()
    averaged = mine.grad.fetch(all=True)
    assert theirs.grad is not None
    assert not torch.allclose(each[0], each[1])
    assert torch.equal(averaged[0], averaged[1])
    torch.testing.assert_close(averaged[0], theirs.grad)


def test_a_function_of_the_clients_script_travels_with_what_it_refers_to_at_each_call(session: Session) -> None:
    factor = 5.0

    class Scaling(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            return grad * factor

    for factor in (5.0, 6.0):
        leaf = session.ones(2, requires_grad=True)
        Scaling.apply(leaf).sum().backward()
        assert [grad.tolist() for grad in leaf.grad.fetch(all=True)] == [[factor] * 2] * 2


def test_ddp_for_fifty_steps_is_one_process_with_the_joined_batch(session: Session) -> None:
    data, target = batch()
    session.rank(0).manual_seed(1)
    session.rank(1).manual_seed(2)  # so that the ranks' modules differ until ddp gives all of them rank 0's
    module = session.module(net)
    ddp = session.ddp(module)
    local = net()
    local.load_state_dict(module.state_dict())
    mine = session.optimizer("rmsprop", ddp.parameters(), lr=0.01)
    theirs = torch.optim.RMSprop(local.parameters(), lr=0.01)
    there = session.scatter(data), session.scatter(target)
    for _ in range(50):
        mine.zero_grad()
        F.cross_entropy(ddp(there[0]), there[1]).backward()
        mine.step()
        theirs.zero_grad()
        F.cross_entropy(local(data), target).backward()
        theirs.step()
    for name, expected in local.state_dict().items():
        left, right = module.named_parameters()[name].fetch(all=True)
        assert torch.equal(left, right)
        torch.testing.assert_close(left.detach(), expected, rtol=1e-4, atol=1e-5)


def test_no_sync_leaves_each_rank_its_own_gradients(session: Session) -> None:
    ddp = session.ddp(session.module(nn.Linear, 2, 1, bias=False))
    (weight,) = ddp.parameters()
    data = session.scatter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))

    def gradients() -> list[Any]:
        ddp(data).sum().backward()
        return [gradient.tolist() for gradient in weight.grad.fetch(all=True)]

    with ddp.no_sync():
        assert gradients() == [[[1, 2]], [[3, 4]]]
    assert gradients() == [[[4, 6]], [[4, 6]]]  # the mean of what has accumulated on each: (2, 4) and (6, 8)


# -- collectives on handles --------------------------------------------------------------------------------------------

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda every: every.sum(0),
    "mean": lambda every: every.mean(0),
    "product": lambda every: every.prod(0),
    "min": lambda every: every.amin(0),
    "max": lambda every: every.amax(0),
}
EVERY = torch.tensor([[[1.0, 5.0], [2.0, -3.0]], [[4.0, 0.5], [-1.0, 7.0]]])
"""Of each of two ranks, a matrix of two rows."""


def shards(session: Session) -> Any:
    return session.scatter(EVERY)[0]


@pytest.mark.parametrize("op", REDUCTIONS)
def test_all_reduce_gives_every_rank_the_reduction_in_place(session: Session, op: str) -> None:
    mine = shards(session)
    assert collectives.all_reduce(mine, op) is not None
    for fetched in mine.fetch(all=True):
        torch.testing.assert_close(fetched, REDUCTIONS[op](EVERY))


@pytest.mark.parametrize("op", REDUCTIONS)
def test_reduce_scatter_gives_each_rank_its_part(session: Session, op: str) -> None:
    part = collectives.reduce_scatter(shards(session), op)
    torch.testing.assert_close(torch.cat(part.fetch(all=True)), REDUCTIONS[op](EVERY))
    listed = collectives.reduce_scatter(list(shards(session)), op)
    torch.testing.assert_close(torch.stack(listed.fetch(all=True)), REDUCTIONS[op](EVERY))


def test_all_gather_and_broadcast_give_every_rank_the_same(session: Session) -> None:
    gathered = collectives.all_gather(shards(session)).fetch(all=True)
    assert all(torch.equal(fetched, EVERY) for fetched in gathered)
    for source in (0, 1):
        mine = shards(session)
        collectives.broadcast(mine, source)
        assert all(torch.equal(fetched, EVERY[source]) for fetched in mine.fetch(all=True))
    session.barrier()


def test_a_collective_that_one_rank_cannot_do_is_an_error_on_all_and_the_group_stays_usable(session: Session) -> None:
    uneven = session.scatter(torch.arange(3.0))
    total = collectives.all_reduce(uneven)
    with pytest.raises(RemoteOpError, match=r"the workers disagree: rank 0: .*rank 1: "):
        total.fetch()
    session.barrier()
    assert collectives.all_reduce(session.ones(1)).item(all=True) == [2, 2]


def test_the_process_group_is_left_and_joined_again(session: Session) -> None:
    session.run(distributed.destroy_process_group)
    assert session.run(torch.distributed.is_initialized) is False
    assert collectives.all_reduce(session.ones(1)).item(all=True) == [1, 1]  # each a group of its own
    session.run(distributed.init_process_group, "gloo", timeout_s=60)
    assert session.run(torch.distributed.get_world_size) == 2
    assert collectives.all_reduce(session.ones(1)).item(all=True) == [2, 2]
    assert distributed.is_available() is session.run(distributed.is_available) is True


# -- each rank, many threads, many operations --------------------------------------------------------------------------


def test_the_seed_is_each_ranks_own(session: Session) -> None:
    session.manual_seed(5)
    torch.manual_seed(5)
    drawn, expected = session.randn(4).fetch(all=True), torch.randn(4)
    assert torch.equal(drawn[0], expected)
    assert torch.equal(drawn[1], expected)


def test_large_tensors_travel_whole(session: Session) -> None:
    local = torch.randn(1_500, 1_000)
    remote = session.scatter(local)
    assert torch.equal(torch.cat(remote.fetch(all=True)), local)
    assert torch.equal((session.tensor(local.bfloat16()) + 0).fetch(), local.bfloat16())


def test_what_ranks_do_to_a_large_tensor_is_seen_by_no_other(session: Session) -> None:
    local = torch.zeros(1_000, 1_000)
    for send in (session.tensor, session.scatter, session.rank(1).tensor):  # copied by each rank, or taken over
        remote, again = send(local), send(local)
        remote += 1
        assert remote.all().item()
        assert not again.any().item()
        assert not local.any()


def test_sixteen_threads_allocate_use_and_free_handles(session: Session) -> None:
    threads = 16
    (session.ones(1) + 1).add_(1)
    together = threading.Barrier(threads)

    def work(thread: int) -> list[int]:
        together.wait()
        handles = []
        for index in range(HANDLES):
            tensor = session.ones(1)
            tensor += index + thread
            handles.append(tensor.handle)
            if index % 500 == 0:
                assert tensor.item() == 1 + index + thread
            if index % 2:
                tensor.free()
        return handles

    with ThreadPoolExecutor(threads) as pool:
        every = list(pool.map(work, range(threads)))
    assert len({handle for handles in every for handle in handles}) == threads * HANDLES
    session.synchronize()
    assert session.handles() == []


def test_many_operations_leave_the_workers_memory_where_it_was(session: Session) -> None:
    def resident() -> int:
        with Path("/proc/self/statm").open(encoding="utf-8") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def work(operations: int) -> float:
        tensor = session.ones(16)
        for _ in range(operations):
            tensor = tensor + 1
        return float(tensor[0])

    work(50_000)
    before = [session.rank(rank).run(resident) for rank in (0, 1)]
    assert work(OPERATIONS) == OPERATIONS + 1
    after = [session.rank(rank).run(resident) for rank in (0, 1)]
    assert all(abs(late - early) < 20 << 20 for early, late in zip(before, after, strict=True))


# -- other clients -----------------------------------------------------------------------------------------------------


def take_and_change(session: Session, handle: int) -> tuple[int, list[float]]:
    """Work with what another client has made, and leave something of one's own there."""
    theirs = session.get(handle)
    mine = theirs * 10
    theirs += 1
    LEFT_THERE.append(mine)
    return session.workers, mine.fetch(all=True)[1].tolist()


LEFT_THERE: list[Any] = []


def test_a_client_that_joins_by_name_sees_a_handle_and_its_own_are_freed_when_it_goes(
    session: Session, cluster: str
) -> None:
    tensor = session.scatter(torch.tensor([1.0, 2.0]))
    with guest(cluster, NAME, take_and_change) as leaving, guest(cluster, NAME, take_and_change) as killed:
        for each, found in ((leaving, [20.0]), (killed, [30.0])):
            each.ask(tensor.handle)
            assert each.answer() == (2, found)
        assert tensor.fetch(all=True) == [torch.tensor([3.0]), torch.tensor([4.0])]
        assert len(session.handles()) > 2
        killed.kill()
        leaving.leave()
    wait_until(lambda: [found["handle"] for found in session.handles()] == [tensor.handle], 30)
    assert tensor.item(all=True) == [3, 4]


def test_a_name_is_taken_once_and_must_be_there(session: Session) -> None:
    with pytest.raises(SessionError, match="there is a session named 'shared' already"):
        raytorch.connect(workers=1, name=NAME)
    with pytest.raises(SessionError, match="there is no session named 'other'"):
        raytorch.connect(name="other")
    with pytest.raises(HandleError, match="names nothing in this session"):
        session.get(10**12)


def test_only_the_workers_import_torch(session: Session) -> None:
    transport: Any = session._transport
    for actor in (transport._host, transport._fit._trainer.controller):
        assert "torch" not in ray.get(actor.__ray_call__.remote(lambda self: set(sys.modules)))


# -- limits ------------------------------------------------------------------------------------------------------------


def test_how_long_a_call_may_take_is_the_sessions_own_setting_and_not_that_of_later_runs(session: Session) -> None:
    name = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
    transport: Any = session._transport
    controller = transport._fit._trainer.controller
    patience = ray.get(controller.__ray_call__.remote(lambda self: float(os.environ[name])))
    assert patience == 7 * 24 * 3600
    assert name not in os.environ


@pytest.mark.usefixtures("opened")
def test_a_session_keeps_to_its_quota_and_ends_when_nobody_uses_it() -> None:
    with raytorch.connect(workers=2, name="brief", max_bytes=1 << 20, idle_timeout=2) as session:
        session.rank(1).run(time.sleep, 4)
        session.barrier()  # rank 0 has waited for the other
        big = session.zeros(1 << 20)
        with pytest.raises(RemoteOpError, match=r"QuotaError: 4,194,304 bytes more .* 1,048,576 bytes"):
            big.fetch()
        assert session.zeros(1 << 17).sum().item() == 0
        (pid,) = (session.run(os.getpid),)
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), 30)
        for use in (session.ones(1).fetch, session.synchronize, session.handles):
            with pytest.raises(SessionLostError, match="idle for longer than idle_timeout"):
                use()
    with pytest.raises(SessionError, match="there is no session named 'brief'"):
        raytorch.connect(name="brief")
