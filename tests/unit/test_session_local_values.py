"""Local tensors and arrays beside handles: what would lose a gradient or a change without a word is refused."""

import operator
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from compared import assert_same
from in_process import local_session
from torch import nn
from torch.nn import functional as F

from raytorch.errors import RemoteOpError, SessionError
from raytorch.session.session import Session

DATA = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
NO_GRADIENT = (
    r"requires grad would get no gradient.*session\.module\(\.\.\.\).*session\.tensor\(w, requires_grad=True\)"
)


@pytest.fixture
def session() -> Iterator[Session]:
    with local_session(1) as session:
        yield session


# -- gradients ---------------------------------------------------------------------------------------------------------

WEIGHT = DATA.clone().requires_grad_()
LAYER = nn.Linear(2, 2)
MEETINGS: dict[str, Callable[[Session, Any], Any]] = {
    "a module": lambda s, h: LAYER(h),
    "an operand": lambda s, h: h @ WEIGHT,
    "the left operand": lambda s, h: WEIGHT @ h,
    "no leaf": lambda s, h: (WEIGHT * 2) + h,
    "a parameter": lambda s, h: F.linear(h, LAYER.weight),
    "in a list": lambda s, h: torch.stack([h, WEIGHT]),
    "a keyword": lambda s, h: torch.add(input=h, other=WEIGHT),
    "in place": lambda s, h: h.detach().copy_(WEIGHT),
    "an argument of a remote module": lambda s, h: s.module(nn.Tanh)(WEIGHT),
    "an argument of a function": lambda s, h: s.run(torch.add, h, WEIGHT),
    "in a function": lambda s, h: s.run(lambda x: x @ WEIGHT, h),
    "a function that is a module": lambda s, h: s.run(LAYER, h),
    "in a checkpoint": lambda s, h: s.checkpoint(LAYER, h),
    "in a hook": lambda s, h: (h * 1).requires_grad_().register_hook(lambda grad: grad * WEIGHT),
    "added to an optimizer": lambda s, h: s.optimizer("sgd", [s.ones(1, requires_grad=True)], lr=1).call(
        "add_param_group", {"params": [WEIGHT]}
    ),
}


@pytest.mark.parametrize("name", MEETINGS)
def test_a_local_tensor_that_requires_grad_is_refused_beside_a_handle(session: Session, name: str) -> None:
    handle = session.tensor(DATA)
    with pytest.raises(SessionError, match=NO_GRADIENT):
        MEETINGS[name](session, handle)
    assert_same(handle + DATA, DATA + DATA)


def test_where_no_gradient_is_wanted_it_is_taken_as_it_is(session: Session) -> None:
    handle = session.tensor(DATA)
    assert torch.equal(handle, WEIGHT)
    assert torch.allclose(handle, WEIGHT)
    assert_same(handle @ WEIGHT.detach(), DATA @ DATA)
    with torch.no_grad():
        assert_same(LAYER(handle), LAYER(DATA))
        assert_same(handle @ WEIGHT, DATA @ DATA)
        assert session.run(lambda x: LAYER(x).sum().item(), handle) == LAYER(DATA).sum().item()
    assert isinstance(session.run(lambda: LAYER).state_dict()["weight"], torch.Tensor)
    net = session.module(nn.Linear, 2, 2)
    net.load_state_dict(dict(LAYER.named_parameters()))
    assert_same(net(handle), LAYER(DATA))
    assert session.tensor(WEIGHT).requires_grad


def test_what_would_train_a_copy_is_refused(session: Session) -> None:
    local = torch.optim.SGD(LAYER.parameters(), lr=1.0)
    for parameters in (LAYER.parameters(), [{"params": list(LAYER.parameters())}], [WEIGHT]):
        with pytest.raises(SessionError, match=r"optimizer would change copies.*session\.module"):
            session.optimizer("sgd", parameters, lr=1.0)
    with pytest.raises(SessionError, match=r"copy of a local optimizer.*session\.optimizer"):
        session.scheduler(torch.optim.lr_scheduler.StepLR, local, step_size=1)  # type: ignore[arg-type]
    with pytest.raises(SessionError, match=r"copy of a local module.*session\.module"):
        session.ddp(LAYER)  # type: ignore[arg-type]


# -- changes -----------------------------------------------------------------------------------------------------------

CHANGES: dict[str, Callable[[Any, Any], Any]] = {
    "add_": lambda local, h: local.add_(h),
    "+=": lambda local, h: local.__iadd__(h),
    "copy_": lambda local, h: local.copy_(h),
    "an item": lambda local, h: local.__setitem__(0, h[0]),
    "at an index": lambda local, h: local.__setitem__(h > 2, 5.0),
    "out": lambda local, h: torch.add(h, 1, out=local),
    "one of several out": lambda local, h: torch.max(h, 0, out=(local[0], torch.zeros(2, dtype=torch.long))),
    "one of a list": lambda local, h: torch._foreach_add_([h, local], 1.0),
    "statistics": lambda local, h: F.batch_norm(h, local[0], local[1], training=True),
    "a weight that is renormalized": lambda local, h: F.embedding(h.long() // 3, local, max_norm=0.1),
    "at a mask of a handle": lambda local, h: local.masked_fill_(h > 2, 0.0),
    "data": lambda local, h: setattr(local, "data", h),
    "grad": lambda local, h: setattr(local, "grad", h),
    "set_": lambda local, h: local.set_(h),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_local_tensor_is_not_changed_by_what_is_on_the_workers(session: Session, name: str) -> None:
    local, handle = DATA.clone(), session.tensor(DATA)
    for _ in range(2):
        with pytest.raises((SessionError, TypeError, RuntimeError)):
            CHANGES[name](local, handle).fetch()
    assert torch.equal(local, DATA)


def test_a_local_layer_without_parameters_is_refused_where_it_would_gather_statistics(session: Session) -> None:
    layer, handle = nn.BatchNorm1d(2, affine=False), session.tensor(DATA)
    with pytest.raises(RemoteOpError, match=r"changes a local tensor.*session\.module\(\)"):
        layer(handle).fetch()
    assert_same(layer.eval()(handle), layer(DATA))
    untracked = nn.BatchNorm1d(2, affine=False, track_running_stats=False)
    assert_same(untracked(handle), untracked(DATA))


@pytest.mark.parametrize("deviation", [torch.tensor(1.0), torch.ones(4, 2)[::2], torch.ones(2, 2).T])
def test_a_local_tensor_of_any_shape_is_an_argument_of_what_is_named_like_norm(
    session: Session, deviation: torch.Tensor
) -> None:
    handle = session.zeros(2, 2)
    assert torch.normal(handle, deviation).shape == (2, 2)
    assert torch.normal(handle, deviation).fetch().isfinite().all()


def test_a_function_for_the_workers_may_change_its_copy_of_a_local_tensor(session: Session) -> None:
    assert_same(session.run(lambda local: local.add_(1), DATA), DATA + 1)


# -- NumPy -------------------------------------------------------------------------------------------------------------

OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "multiply": lambda h, array: h * array,
    "multiplied": lambda h, array: array * h,
    "subtract": lambda h, array: h - array,
    "subtracted": lambda h, array: array - h,
    "power": lambda h, array: h**array,
    "matmul": lambda h, array: h @ array,
    "in place": lambda h, array: operator.iadd(h.detach(), array),
    "an array in place": lambda h, array: operator.iadd(array, h),
    "equal": lambda h, array: h == array,
    "an array is equal": lambda h, array: array == h,
    "less": lambda h, array: array < h,
    "np.multiply": lambda h, array: np.multiply(h, array),
    "np.exp": lambda h, array: np.exp(h),
    "np.maximum": lambda h, array: np.maximum(array, h),
    "reduce": lambda h, array: np.add.reduce(h),
}


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("name", OPERATORS)
def test_an_array_is_no_operand_of_a_handle(session: Session, name: str, requires_grad: bool) -> None:
    handle, array = session.tensor(DATA, requires_grad=requires_grad), DATA.numpy().copy()
    with pytest.raises((SessionError, TypeError), match=r"session\.tensor\(array\)|__array_ufunc__"):
        OPERATORS[name](handle, array)
    assert np.array_equal(array, DATA.numpy())
    assert_same(handle.detach() + 0, DATA)


def test_an_array_keeps_no_graph_so_a_tensor_that_requires_grad_gives_none(session: Session) -> None:
    handle = session.tensor(DATA, requires_grad=True)
    for use in (handle.numpy, lambda: np.asarray(handle), lambda: np.stack([handle]), lambda: np.linalg.norm(handle)):
        with pytest.raises(SessionError, match=r"detach\(\)\.numpy\(\)"):
            use()
    assert np.array_equal(handle.detach().numpy(), DATA.numpy())
    assert np.linalg.norm(handle.detach()) == np.linalg.norm(DATA)


def test_arrays_are_indices_and_numpys_numbers_are_operands(session: Session) -> None:
    handle = session.tensor(DATA, requires_grad=True)
    assert_same(handle[np.array([1, 0])].detach(), DATA[[1, 0]])
    for number in (np.float32(3), np.float64(3), np.int64(3), np.bool_(True)):
        assert_same((number * handle).detach(), number * DATA)
        assert_same((handle - number).detach(), DATA - number)
        assert_same(number < handle, number < DATA)
    (np.float64(2) * handle).sum().backward()
    assert handle.grad.tolist() == [[2, 2], [2, 2]]


@pytest.mark.parametrize("operand", [[1, 2], "word", None, {"a": 1}])
def test_an_operator_in_place_with_what_is_no_operand_raises_and_changes_nothing(
    session: Session, operand: Any
) -> None:
    handle = session.tensor(DATA)
    for name in ("__iadd__", "__imul__", "__ipow__"):
        getattr(handle, name)(operand)
        with pytest.raises(RemoteOpError, match="TypeError"):
            session.synchronize()
