"""Remote tensors, used as PyTorch's own are and compared with them, on workers in this process."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from compared import assert_same, check
from in_process import local_session
from torch.nn import functional as F

from raytorch.errors import RemoteOpError
from raytorch.session.session import Session


@pytest.fixture
def session() -> Iterator[Session]:
    with local_session(2) as session:
        yield session


A, B = torch.randn(3, 3), torch.randn(3, 3)
X, Y = torch.randint(1, 9, (3, 3)), torch.randint(1, 9, (3, 3))


# -- operators, functions, methods, attributes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda a, b: [a + b, a - b, a * b, a / b, a @ b, a // b, a % b, a**2, abs(a) ** b],
        lambda a, b: [2 + a, 2 - a, 2 * a, 2 / a, 2 // a, 2 % a, 2**a, a + 2, a - 2.5, a * 2, a / 2],
        lambda a, b: [-a, +a, abs(a)],
        lambda a, b: [a == b, a != b, a < b, a <= b, a > b, a >= b, a == 0, a.gt(0)],
        lambda a, b: [torch.add(a, b, alpha=2), torch.where(a > b, a, b), torch.cat([a, b]), torch.stack((a, b), 1)],
        lambda a, b: [torch.einsum("ij,jk->ik", a, b), F.softmax(a, dim=-1), F.cross_entropy(a, b.softmax(1))],
        lambda a, b: [a.sum(), a.sum(0), a.sum(dim=(0, 1), keepdim=True), a.mean(1), a.t().reshape(-1)],
        lambda a, b: [a.clamp(min=0), a.to(torch.float64), a.half(), a.type(torch.int32), a.masked_fill(a > b, 7.0)],
        lambda a, b: [a.view(1, 9).expand(2, 9), a.permute(1, 0), a[None].squeeze(0), a.new_zeros(2), a.clone()],
    ],
)
def test_floating_point_operations_are_pytorchs(session: Session, use: Callable[..., Any]) -> None:
    check(session, use, A, B)


def test_integer_operations_are_pytorchs(session: Session) -> None:
    check(session, lambda x, y: [x + y, x // y, x % y, x & y, x | y, x ^ y, ~x, x << 1, x >> y, 3 & x, 1 | x], X, Y)
    check(session, lambda x, y: [~(x > y), (x > y) & (x < 5), x.bincount() if x.dim() == 1 else x.flatten()], X, Y)


@pytest.mark.parametrize(
    "name", ["T", "mT", "H", "mH", "real", "data", "shape", "dtype", "ndim", "is_leaf", "itemsize"]
)
def test_attributes_are_pytorchs(session: Session, name: str) -> None:
    check(session, lambda a: getattr(a, name), A)


def test_what_is_no_tensor_comes_as_pythons_own(session: Session) -> None:
    check(session, lambda a: [a.size(), a.size(0), a.dim(), a.numel(), a.stride(), a.is_contiguous(), len(a)], A)
    check(session, lambda a: [torch.equal(a, a), torch.is_floating_point(a), torch.numel(a), a.element_size()], A)
    device = session.ones(2).device
    assert isinstance(device, torch.device)


@pytest.mark.parametrize(
    "index",
    [
        1,
        -1,
        (0, 2),
        slice(1, None),
        slice(None, None, 2),
        (slice(None), 1),
        (..., 0),
        None,
        (None, slice(0, 1)),
        [0, 2],
        torch.tensor([2, 0]),
        torch.tensor([True, False, True]),
        (torch.tensor([0, 1]), torch.tensor([1, 2])),
    ],
    ids=str,
)
def test_items_are_read_and_set(session: Session, index: Any) -> None:
    def assign(tensor: Any) -> Any:
        tensor[index] = 5.0
        return tensor

    check(session, lambda a: a[index], A)
    check(session, assign, A)


def test_handles_index_handles(session: Session) -> None:
    check(session, lambda a, x: [a[x % 3], a[x > 4], a[0, x[0] % 3]], A, X)


def test_an_item_is_a_view_that_writes_through(session: Session) -> None:
    a = session.zeros(2, 2)
    row = a[0]
    row += 1
    a[1][0] = 9
    assert a.tolist() == [[1, 1], [9, 0]]


def test_an_operation_in_place_returns_the_very_handle(session: Session) -> None:
    a = before = session.tensor([1.0, 2.0])
    a += 1
    a *= a
    a /= 2
    assert a is before
    for changed in (a.add_(1), a.clamp_(max=3), a.mul_(a), torch.relu_(a), a.copy_(torch.ones(2)), a.requires_grad_()):
        assert changed is before
    assert before.fetch().equal(torch.ones(2))
    check(session, lambda a, b: [a.add_(b), a.sub_(1), a.t_(), a.zero_(), a.fill_(3)], A, B)


@pytest.mark.parametrize(
    "use",
    [
        lambda a: torch.max(a, 1),
        lambda a: torch.sort(a, dim=0, descending=True),
        lambda a: a.topk(2),
        lambda a: torch.linalg.qr(a)[0],
        lambda a: torch.linalg.slogdet(a @ a.T),
        lambda a: a.split(2),
        lambda a: a.chunk(3, dim=1),
        lambda a: torch.unbind(a, 1),
        lambda a: torch.unique(a > 0, return_counts=True),
        lambda a: torch.nonzero(a > 0, as_tuple=True),
        lambda a: torch.var_mean(a, dim=1),
        lambda a: torch.meshgrid(a[0], a[1], indexing="ij"),
        list,
    ],
)
def test_several_results_have_pytorchs_structure(session: Session, use: Callable[..., Any]) -> None:
    check(session, use, A)


def test_the_number_of_results_may_change_from_call_to_call(session: Session) -> None:
    x = session.arange(6)
    for size in (1, 2, 3, 6):
        assert_same(x.split(size), torch.arange(6).split(size))
    for length in (2, 5, 3):
        assert [int(part) for part in session.arange(length)] == list(range(length))


def test_named_results_are_read_by_name(session: Session) -> None:
    found = session.tensor(A).max(dim=0)
    assert_same([found.values, found.indices], [A.max(dim=0).values, A.max(dim=0).indices])


def test_out_writes_to_the_given_handle(session: Session) -> None:
    a, out = session.tensor(A), session.empty(3, 3)
    assert torch.mul(a, 2, out=out) is out
    assert torch.add(out, 1, out=out) is out
    assert_same(out, A * 2 + 1)
    values, indices = session.empty(3), session.empty(3, dtype=torch.int64)
    torch.max(a, 1, out=(values, indices))
    assert_same([values, indices], list(torch.max(A, 1)))


def test_values_come_as_numbers_arrays_and_lists(session: Session) -> None:
    a = session.tensor(A)
    assert a[0, 0].item() == A[0, 0].item()
    assert a.tolist() == A.tolist()
    assert (bool(a[0, 0] != 99), float(a[0, 0]), int(a[0, 0] * 100)) == (True, float(A[0, 0]), int(A[0, 0] * 100))
    assert complex(a[0, 0]) == complex(A[0, 0])
    assert [10, 20, 30][session.tensor(1)] == 20
    np.testing.assert_array_equal(a.numpy(), A.numpy())
    np.testing.assert_array_equal(np.asarray(a), A.numpy())
    assert (A[0, 0].item() in a) is True
    with pytest.raises(RemoteOpError, match="ambiguous"):
        bool(a)
    with pytest.raises(AttributeError, match=r"neither RemoteTensor nor torch\.Tensor has an attribute 'colour'"):
        _ = a.colour


def test_local_tensors_mix_with_handles(session: Session) -> None:
    a = session.tensor(A)
    results = [a + B, B + a, torch.matmul(B, a), torch.cat([B, a]), a.where(B > 0, B), F.linear(a, B, bias=B[0])]
    local = [A + B, B + A, torch.matmul(B, A), torch.cat([B, A]), A.where(B > 0, B), F.linear(A, B, bias=B[0])]
    assert_same(results, local)


# -- autograd and modes ------------------------------------------------------------------------------------------------


def test_gradients_are_pytorchs(session: Session) -> None:
    def use(leaf: Any, b: Any) -> Any:
        leaf.requires_grad = True
        before = leaf.grad
        ((leaf @ b).sigmoid() ** 2).sum().backward()
        first = leaf.grad.clone()
        (leaf * b).sum().backward()
        leaf.requires_grad = False
        grad, leaf.grad = leaf.grad, None
        return [before, first, grad, leaf.grad, leaf.requires_grad]

    check(session, use, A, B)


def test_a_gradient_that_comes_and_goes_is_seen_each_time(session: Session) -> None:
    leaf = session.tensor(A, requires_grad=True)
    for _ in range(3):
        assert leaf.grad is None
        (leaf * leaf).sum().backward()
        assert_same(leaf.grad, 2 * A)
        leaf.grad = None
    leaf.grad = session.ones(3, 3)
    assert_same(leaf.grad, torch.ones(3, 3))


def test_what_only_some_tensors_have_is_asked_of_each(session: Session) -> None:
    leaf = session.tensor(A, requires_grad=True)
    view, total = leaf.detach()[0], (leaf * 2).sum()
    assert (leaf._base, leaf._grad, leaf._grad_fn) == (None, None, None)
    total.backward()
    assert_same(view._base, A)
    assert_same(leaf._grad, torch.full((3, 3), 2.0))
    assert total._grad_fn is not None
    assert leaf._base is None


def test_autograd_grad_goes_as_deep_as_pytorchs(session: Session) -> None:
    def use(a: Any) -> Any:
        a.requires_grad_()
        (first,) = torch.autograd.grad((a**3).sum(), a, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), [a])
        return [first.detach(), second, a.detach()]

    check(session, use, A)


def test_data_is_assigned_without_a_graph(session: Session) -> None:
    leaf = session.tensor(A, requires_grad=True)
    leaf.data = B
    assert_same(leaf, B.clone().requires_grad_())
    leaf.data.mul_(2)
    assert_same(leaf.detach(), B * 2)


def test_no_grad_on_the_client_takes_effect_on_the_worker(session: Session) -> None:
    weight = session.tensor(A, requires_grad=True)
    recorded = []
    for _ in range(3):
        with torch.no_grad():
            recorded.append((weight * 2).requires_grad)
            weight -= 0.5
        recorded.append((weight * 2).requires_grad)
        with torch.no_grad(), torch.enable_grad():
            recorded.append((weight * 2).requires_grad)
    assert recorded == [False, True, True] * 3
    assert_same(weight.detach(), A - 0.5 - 0.5 - 0.5)


def test_autocast_on_the_client_takes_effect_on_the_worker(session: Session) -> None:
    def use(a: Any, b: Any) -> Any:
        results = []
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                results += [a @ b, (a @ b) + a]
                with torch.autocast("cpu", enabled=False):
                    results.append(a @ b)
        return [*results, a @ b]

    check(session, use, A, B)


def test_the_seed_gives_the_numbers_that_it_gives_here() -> None:
    def draw(source: Any) -> list[Any]:
        source.manual_seed(5)
        drawn = [source.rand(3), source.randn(2, 2), source.randint(0, 9, (4,)), source.randperm(6)]
        return [*drawn, F.dropout(drawn[1], 0.5)]

    with local_session(1) as session:
        remote = draw(session)
        remote = [tensor.fetch() for tensor in remote]
    for left, right in zip(remote, draw(torch), strict=True):
        assert torch.equal(left, right)


def test_factories_are_pytorchs(session: Session) -> None:
    def make(source: Any) -> list[Any]:
        ranges = [source.arange(5), source.arange(1, 9, 2.5), source.linspace(0, 1, 5), source.logspace(0, 2, 3)]
        filled = [source.zeros(2, 3), source.ones((2,), dtype=torch.int8), source.full((2, 2), 7.5), source.eye(3)]
        indices = [source.tril_indices(3, 3), source.triu_indices(3, 3, 1)]
        return [*ranges, *filled, *indices, source.zeros(2, requires_grad=True), source.zeros(0), source.ones(())]

    assert_same(make(session), make(torch))
    assert session.empty(4, 5, dtype=torch.bool).shape == (4, 5)
    with pytest.raises(AttributeError, match="'Session' object has no attribute 'zeroes'"):
        _ = session.zeroes
