"""What travels between a client and its workers, and when: tensors to and fro, shards, programs, frees."""

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from compared import assert_same, held_by
from in_process import InProcess, local_session, registries
from torch import nn

from raytorch.errors import HandleError, RemoteOpError, SessionError
from raytorch.session.remote_tensor import RemoteTensor
from raytorch.session.session import Session
from raytorch.session.tensor_transfer import AdoptedMemory, Payload


@pytest.fixture
def session() -> Iterator[Session]:
    with local_session(2) as session:
        yield session


A, B = torch.randn(3, 3), torch.randn(3, 3)

# -- tensors to and fro ------------------------------------------------------------------------------------------------

TRANSFERRED = {
    **{str(dtype): torch.randn(2, 3).mul(9).to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64)},
    **{
        str(dtype): torch.arange(6).view(2, 3).to(dtype)
        for dtype in (torch.bool, torch.uint8, torch.int16, torch.int64)
    },
    **{str(dtype): torch.randn(2, 3).to(dtype) for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)},
    "complex": torch.randn(3, dtype=torch.complex64),
    "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
    "no dimension": torch.tensor(2.5),
    "bfloat16 without a dimension": torch.tensor(2.5, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 4),
    "empty bfloat16": torch.zeros(0, 4, dtype=torch.bfloat16),
    "transposed": A.T,
    "strided": torch.arange(20).view(4, 5)[::2, ::3],
    "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
    "bfloat16 transposed": A.to(torch.bfloat16).T,
    "large": torch.randn(600, 700),
    "needs a gradient": torch.ones(2, requires_grad=True),
    "of a graph": torch.ones(2, requires_grad=True) * 2,
}


@pytest.mark.parametrize("name", TRANSFERRED)
def test_a_tensor_comes_back_as_it_went(session: Session, name: str) -> None:
    local = TRANSFERRED[name]
    for fetched in session.tensor(local).fetch(all=True):
        assert (fetched.dtype, fetched.shape) == (local.dtype, local.shape)
        assert fetched.requires_grad == local.requires_grad
        assert torch.equal(fetched.detach().to(torch.complex128), local.detach().to(torch.complex128))


def test_a_tensor_made_on_the_worker_comes_whatever_its_layout(session: Session) -> None:
    a = session.tensor(A)
    assert_same(
        [a.T, a[::2, 1:], a[0].expand(2, 3), a.bfloat16().T], [A.T, A[::2, 1:], A[0].expand(2, 3), A.bfloat16().T]
    )
    assert_same([a[:0], a.sum(), (a > 0).T, a.to(torch.complex64).conj()], [A[:0], A.sum(), (A > 0).T, A + 0j])
    assert_same(a.requires_grad_() * 2, A.clone().requires_grad_() * 2)


def test_what_is_sent_and_fetched_is_a_copy(session: Session) -> None:
    for size in (2, 1 << 20):
        local, array = torch.zeros(size), np.zeros(size)
        sent = [session.tensor(local), session.scatter(local), session.tensor(array), session.zeros(1) + local]
        local += 1
        array += 1
        for remote in sent:
            fetched = remote.fetch()
            fetched += 1
            assert not remote.any().item()


def test_numbers_lists_and_arrays_become_tensors(session: Session) -> None:
    for data in (3, 2.5, True, [1, 2], [[1.0], [2.0]], np.arange(3, dtype=np.float64), np.float32(2)):
        assert_same(session.tensor(data), torch.as_tensor(data))
    assert_same(session.tensor([1.0], requires_grad=True), torch.tensor([1.0], requires_grad=True))


def test_a_sparse_tensor_is_refused_with_the_remedy(session: Session) -> None:
    with pytest.raises(SessionError, match=r"to_dense\(\)"):
        session.tensor(torch.eye(3).to_sparse())


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (torch.eye(3).to_sparse(), r"to_dense\(\)"),
        (torch.ones(2, device="meta"), "without content"),
        (nn.LazyLinear(2).weight, "without content"),
        ([[1.0], [2.0, 3.0]], "made of a list: .*all of one length"),
        ("abc", "made of a str"),
        (2**70, "made of a int"),
        (None, "made of a NoneType"),
        (np.array(["a"]), "made of a ndarray"),
    ],
)
def test_what_is_no_tensor_is_refused_with_what_is(session: Session, data: Any, told: str) -> None:
    for send in (session.tensor, session.scatter, session.rank(0).tensor):
        with pytest.raises(SessionError, match=told):
            send(data)


@pytest.mark.parametrize("rows", [2, 4, 5])
def test_scatter_gives_each_rank_its_shard_as_evenly_as_can_be(session: Session, rows: int) -> None:
    local = torch.randn(rows, 3)
    for data in (local, local.numpy(), local.tolist()):
        shards = session.scatter(data)
        assert torch.equal(torch.cat(shards.fetch(all=True)), local)
        lengths = session.scatter(local).sum(1).fetch(all=True)
        assert [len(part) for part in lengths] == [(rows + 1) // 2, rows // 2]
        assert torch.equal(shards.fetch(), local[: (rows + 1) // 2])


@pytest.mark.parametrize("data", [[1.0], 1.0, torch.zeros(0, 3)])
def test_what_has_fewer_rows_than_workers_is_not_scattered(session: Session, data: Any) -> None:
    with pytest.raises(SessionError, match="cannot be split over 2 workers"):
        session.scatter(data)


def test_a_rank_of_its_own_holds_what_is_made_there(session: Session) -> None:
    one = session.rank(1)
    made = one.tensor(A) @ one.ones(3, 3) + B
    assert torch.equal(made.fetch(), A @ torch.ones(3, 3) + B)
    made += 1
    assert made.shape == (3, 3)
    assert made.item is not None
    both = session.zeros(3, 3) + made
    assert torch.equal(both.fetch(), made.fetch())
    assert all(tensor.handle not in registries(session)[0] for tensor in (made, both))
    assert all(tensor.handle in registries(session)[1] for tensor in (made, both))
    assert made.sum().item(all=True) == [made.sum().item()]
    with pytest.raises(SessionError, match="there is no rank 2: the session has 2 workers, from 0"):
        session.rank(2)


def test_every_rank_is_asked_with_all(session: Session) -> None:
    shards = session.scatter(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert [part.tolist() for part in shards.fetch(all=True)] == [[1, 2], [3, 4]]
    assert shards.sum().item(all=True) == [3.0, 7.0]
    assert shards.sum().item() == 3.0


# -- when things travel ------------------------------------------------------------------------------------------------


class Waited:
    """A future that tells of each wait for it in the main thread."""

    def __init__(self, future: Any, waits: list[Any]) -> None:
        self._future, self._waits, self._is_known_done = future, waits, False

    def done(self) -> bool:
        self._is_known_done = bool(self._future.done())
        return self._is_known_done

    def result(self) -> Any:
        if threading.current_thread() is threading.main_thread() and not self._is_known_done:
            self._waits.append(self._future)
        return self._future.result()


class Waiting(InProcess):
    """Notes for what the client waits."""

    def __init__(self) -> None:
        super().__init__(2, None)
        self.waits: list[Any] = []

    def send(self, *program: Any) -> Any:
        return [Waited(future, self.waits) for future in super().send(*program)]


def test_known_operations_are_recorded_without_waiting_and_travel_together() -> None:
    def step(weight: RemoteTensor, data: RemoteTensor) -> RemoteTensor:
        hidden = torch.relu(data @ weight)
        values, _ = hidden.max(dim=1)
        weight += values.mean()
        weight[0] = 0
        return weight

    transport = Waiting()
    with Session(transport) as session:
        weight, data = session.zeros(3, 3), session.ones(2, 3)
        step(weight, data).sum().item()
        programs, waits = transport.programs, len(transport.waits)
        for _ in range(100):
            total = step(weight, data).sum()
        assert len(transport.waits) == waits
        assert transport.programs - programs < 100  # of 700 operations
        assert total.item() == 0
        assert len(transport.waits) == waits + 1


# -- when things are freed ---------------------------------------------------------------------------------------------


def test_a_tensor_is_freed_when_its_handle_is_collected(session: Session) -> None:
    a = session.ones(2)
    for _ in range(50):
        a = a + 1
    assert [len(registry) for registry in held_by(session)] == [1, 1]
    values, indices = session.tensor(A).max(1)
    del a, values
    assert [[handle for handle, _ in registry] for registry in held_by(session)] == [[indices.handle]] * 2
    assert_same(indices, A.max(1).indices)
    parts = session.arange(4).split(1)
    del parts, indices
    assert [len(registry) for registry in held_by(session)] == [0, 0]


def test_a_tensor_that_was_freed_by_hand_names_nothing(session: Session) -> None:
    a = session.ones(2)
    double = a * 2
    a.free()
    a.free()
    assert double.tolist() == [2, 2]
    assert [a.handle in registry for registry in held_by(session)] == [False, False]
    for use in (a.fetch, a.tolist, (a + 1).fetch):
        with pytest.raises(RemoteOpError, match=f"HandleError: handle {a.handle} names nothing: it was freed"):
            use()
    assert double.tolist() == [2, 2]


def test_a_handle_is_found_by_its_number_and_kind(session: Session) -> None:
    a = session.tensor(A)
    again = session.get(a.handle)
    assert_same(again, A)
    assert session.handles()[0] == {
        "handle": a.handle,
        "kind": "tensor",
        "type": "float32",
        "shape": (3, 3),
        "device": "cpu",
    }
    again.free()
    assert_same(a, A)
    with pytest.raises(HandleError, match=f"handle {a.handle} names a tensor, not a module"):
        session.get(a.handle, "module")
    with pytest.raises(HandleError, match="handle 99999 names nothing in this session"):
        session.get(99999)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_handle_of_a_single_rank_is_found_with_its_rank(session: Session, rank: int) -> None:
    made, both = session.rank(rank).tensor(A), session.zeros(2)
    again = session.get(made.handle)
    assert torch.equal((again * 2).fetch(), 2 * A)
    assert repr(again) == f"RemoteTensor(handle={again.handle}, rank={rank})"
    assert "rank" not in repr(session.get(both.handle))
    ranks = {found["handle"]: found.get("ranks") for found in session.handles()}
    assert ranks == {made.handle: [rank], both.handle: None, again.handle: [rank]}


# -- memory of the object store ----------------------------------------------------------------------------------------


def test_the_object_stores_memory_is_taken_over_up_to_a_limit() -> None:
    memory = AdoptedMemory(most=2_000)

    def arrived() -> Payload:
        return memory.admit(Payload(np.zeros(1_000, np.uint8), torch.uint8, is_private=True))

    first, second = arrived(), arrived()
    assert first.is_private
    assert second.is_private
    assert not arrived().is_private
    tensor = first.adopted()
    tensor += 1
    assert first.array.all()
    del first
    assert not arrived().is_private  # the tensor still has it
    del tensor
    assert arrived().is_private


def test_an_array_that_others_have_too_is_copied() -> None:
    payload = AdoptedMemory().admit(Payload(np.zeros(10, np.uint8), torch.uint8))
    assert not payload.is_private
