"""The table of tensor operations: what each computes, and that a handle can take each over."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from raytorch import tensor_ops
from raytorch.tensor_ops import TENSOR_OPS

A = torch.tensor([[3.0, -4.0], [1.0, 2.0]])
B = torch.tensor([[2.0, 5.0], [-1.0, 0.5]])
ROWS = torch.tensor([1, 0, 1])

CALLS: dict[str, tuple[tuple[Any, ...], Any]] = {
    "add": ((A, B), A + B),
    "add_scalar": ((A, 1.5), A + 1.5),
    "sub": ((A, B), A - B),
    "mul": ((A, B), A * B),
    "mul_scalar": ((A, 1.5), A * 1.5),
    "div": ((A, B), A / B),
    "matmul": ((A, B), [[10.0, 13.0], [0.0, 6.0]]),
    "cos": ((A,), A.cos()),
    "max": ((A,), 3.0),
    "min": ((A,), -4.0),
    "std": ((torch.tensor([1.0, 3.0, 5.0]),), 2.0),
    "var": ((torch.tensor([1.0, 3.0, 5.0]),), 4.0),
    "norm": ((torch.tensor([[3.0, 0.0], [0.0, -4.0]]),), 5.0),
    "gt": ((A, B), [[True, False], [True, True]]),
    "index": ((A, (slice(None), 0)), [3.0, 1.0]),
    "select": ((A, 0, 1), [1.0, 2.0]),
    "narrow": ((A, 1, 0, 1), [[3.0], [1.0]]),
    "stack": (([A, B], 1), torch.cat([A.unsqueeze(1), B.unsqueeze(1)], dim=1)),
}


class Handle:
    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function, args, kwargs or {}


def test_every_operation_is_here_and_is_an_attribute_of_the_module() -> None:
    assert TENSOR_OPS.keys() == CALLS.keys()
    assert all(getattr(tensor_ops, name) is operation for name, operation in TENSOR_OPS.items())


@pytest.mark.parametrize("name", TENSOR_OPS)
def test_operations_compute(name: str) -> None:
    args, expected = CALLS[name]
    torch.testing.assert_close(TENSOR_OPS[name](*args), torch.as_tensor(expected))


@pytest.mark.parametrize("name", TENSOR_OPS)
def test_a_handle_takes_every_operation_over(name: str) -> None:
    handle, (args, _) = Handle(), CALLS[name]
    given = ([handle, A], *args[1:]) if name == "stack" else (handle, *args[1:])
    function, taken, kwargs = TENSOR_OPS[name](*given)
    assert function.__name__.removeprefix("linalg_") == ("vector_norm" if name == "norm" else TENSOR_OPS[name].__name__)
    assert [type(arg) for arg in taken] == [type(arg) for arg in given]
    assert kwargs == {}


def test_options_are_pytorchs() -> None:
    values, places = TENSOR_OPS["max"](A, dim=1)
    assert (values.tolist(), places.tolist()) == ([3.0, 2.0], [0, 1])
    assert TENSOR_OPS["std"](A, dim=0, correction=0).tolist() == [1.0, 3.0]
    assert TENSOR_OPS["norm"](A, 1, dim=1).tolist() == [7.0, 3.0]


@pytest.mark.parametrize("p", [1, 2, float("inf")])
@pytest.mark.parametrize("dim", [None, 0, (0, 1)])
def test_norm_is_what_torch_norm_documents(p: float, dim: Any) -> None:
    torch.testing.assert_close(TENSOR_OPS["norm"](A, p, dim), torch.norm(A, p, dim))


@pytest.mark.parametrize(
    "indices",
    [
        0,
        -1,
        slice(1, None),
        None,
        ...,
        (1, 0),
        (..., slice(None, None, 2)),
        ROWS,
        (ROWS, torch.tensor([0, 1, 1])),
        A > 0,
        [1, 0],
    ],
)
def test_index_is_what_brackets_give(indices: Any) -> None:
    torch.testing.assert_close(tensor_ops.index(A, indices), A[indices])


def test_index_gives_a_view_and_lets_gradients_through() -> None:
    tensor = A.clone().requires_grad_()
    row = tensor_ops.index(tensor, 1)
    assert row.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    torch.autograd.backward(row.sum())
    assert tensor.grad is not None
    assert tensor.grad.tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize("among", [lambda handle: handle, lambda handle: (slice(None), handle)])
def test_handles_among_the_indices_take_over(among: Callable[[Any], Any]) -> None:
    indices = among(Handle())
    function, args, _ = tensor_ops.index(A, indices)
    assert function is tensor_ops.index
    assert args[0] is A
    assert args[1] is indices
