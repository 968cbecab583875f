"""Contexts, custom functions, checkpoints, objects of any class, and functions that are run on the workers."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from compared import assert_same, held_by
from in_process import local_session
from torch import Tensor, nn
from torch.nn import functional as F

from raytorch.autograd import checkpoint
from raytorch.errors import RemoteOpError, UserError
from raytorch.session.remote_objects import RemoteModule, RemoteObject
from raytorch.session.session import Session


@pytest.fixture
def session() -> Iterator[Session]:
    with local_session(1) as session:
        yield session


# -- contexts, custom functions, checkpoints ---------------------------------------------------------------------------


def test_a_context_keeps_tensors_in_order_and_values_by_name(session: Session) -> None:
    context, first, second = session.context(), session.ones(2), session.zeros(3)
    assert context.saved_tensors == ()
    context.save_tensor(first)
    context.save_tensor(second)
    context.save_value("scale", 2.5)
    context.save_value("name", "shift")
    assert [tensor.tolist() for tensor in context.saved_tensors] == [[1, 1], [0, 0, 0]]
    assert (context.value("scale"), context.value("name")) == (2.5, "shift")
    with pytest.raises(RemoteOpError, match=f"{UserError.__name__}: the context has no value 'colour'; it has name"):
        context.value("colour")


def cube_forward(context: Any, x: Tensor, factor: float) -> Tensor:
    context.save_tensor(x)
    context.save_value("factor", factor)
    return factor * x**3


def cube_backward(context: Any, grad: Tensor) -> tuple[Tensor, None]:
    (x,) = context.saved_tensors
    return grad * 3 * context.value("factor") * x**2, None


def test_a_custom_function_is_differentiated_twice_by_its_own_backward(session: Session) -> None:
    cube = session.function(cube_forward, cube_backward)
    x = session.tensor([2.0, 3.0], requires_grad=True)
    for _ in range(2):
        y = cube.apply(x, 5.0)
        assert y.tolist() == [40, 135]
        (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        assert first.tolist() == [60, 135]
        (second,) = torch.autograd.grad(first.sum(), x)
        assert second.tolist() == [60, 90]
    wrong = session.function(cube_forward, lambda context, grad: (grad * 0 + 7, None))
    wrong.apply(x, 1.0).sum().backward()
    assert x.grad.tolist() == [7, 7]  # ours, where PyTorch's own would be 3 x**2


class Counted(nn.Module):
    """Counts its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(3, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.dropout(torch.tanh(self.linear(x)), 0.5)


def test_a_checkpoint_computes_the_forward_pass_again_in_the_backward_pass(session: Session) -> None:
    def gradients_and_calls(run: Callable[[Any, Any], Any]) -> tuple[Tensor, list[int]]:
        module = session.module(Counted)
        module.load_state_dict(state)
        session.manual_seed(4)
        loss = run(module, session.ones(2, 3)).sum()
        calls = [session.run(lambda held: held.calls, module)]
        loss.backward()
        return module.named_parameters()["linear.weight"].grad.fetch(), [*calls, module.get("calls")]

    state = Counted().state_dict()
    plain, plain_calls = gradients_and_calls(lambda module, x: module(x))
    again, again_calls = gradients_and_calls(session.checkpoint)
    on_worker, worker_calls = gradients_and_calls(lambda module, x: session.run(checkpoint, module, x))
    assert (plain_calls, again_calls, worker_calls) == ([1, 1], [1, 2], [1, 2])
    assert torch.equal(plain, again)  # the same elements were dropped
    assert torch.equal(plain, on_worker)


def test_a_checkpointed_function_is_differentiated_like_the_function(session: Session) -> None:
    x = session.tensor([0.5, 2.0], requires_grad=True)
    session.checkpoint(lambda t, power: (t**power).sin(), x, 3).sum().backward()
    local = torch.tensor([0.5, 2.0], requires_grad=True)
    (local**3).sin().sum().backward()
    assert_same(x.grad, local.grad)


# -- other objects, and functions on the workers -----------------------------------------------------------------------


class Tally:
    def __init__(self, start: int = 0) -> None:
        self.total = start

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor + self.total

    def add(self, tensor: Tensor) -> int:
        self.total += int(tensor.sum())
        return self.total


def test_any_object_is_called_read_and_set(session: Session) -> None:
    tally = session.object(Tally, start=3)
    assert type(tally) is RemoteObject
    assert [tally.call("add", session.ones(2)) for _ in range(3)] == [5, 7, 9]
    assert tally.get("total") == 9
    tally.set("total", 1)
    assert tally(session.zeros(2)).tolist() == [1, 1]
    found = session.get(tally.handle, "object")
    assert found.get("total") == 1
    with pytest.raises(RemoteOpError, match="no attribute 'colour'"):
        tally.get("colour")


class Best:
    """Knows nothing until it was told; then a number, or an array."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def __call__(self) -> float | None:
        return max(self.seen, default=None)

    def tell(self, value: float) -> None:
        self.seen.append(value)

    def array(self) -> Any:
        return np.array(self.seen) if self.seen else None


def test_an_object_that_had_no_result_may_have_one_later(session: Session) -> None:
    best = session.object(Best)
    assert (best(), best.call("__call__"), best.call("array")) == (None, None, None)
    for value in (2.0, 3.0):
        best.call("tell", value)
        assert (best(), best.call("__call__"), best.call("array")[-1]) == (value, value, value)
    assert best.call("array").tolist() == [2, 3]


def test_a_function_on_the_workers_finds_handles_wherever_they_are_nested(session: Session) -> None:
    def look(tree: Any, *, scale: float) -> Any:
        parts = [tree["one"], *tree["more"][0], tree["more"][1]["deep"]]
        assert all(isinstance(part, Tensor) for part in parts)
        return sum(parts) * scale, tree["module"](parts[0]), tree["text"]

    tree = {
        "one": session.ones(2),
        "more": [(session.ones(2), session.ones(2)), {"deep": session.ones(2)}],
        "module": session.module(nn.Identity),
        "text": "as it is",
    }
    total, identity, text = session.run(look, tree, scale=2.0)
    assert (total.tolist(), identity.tolist(), text) == ([8, 8], [1, 1], "as it is")


@pytest.mark.parametrize(
    "value", [None, True, 3, 2.5, 1j, "text", b"bytes", torch.float16, torch.Size([2]), [1, ("a", {"b": None})], {}]
)
def test_a_function_gives_values_as_they_are(session: Session, value: Any) -> None:
    given = session.run(lambda: value)
    assert (type(given), given) == (type(value), value)


def test_a_function_gives_handles_for_what_cannot_leave_the_worker(session: Session) -> None:
    kinds = session.run(lambda: {"tensor": torch.ones(2), "both": [nn.Linear(2, 2), 5], "lock": Tally(2)})
    assert kinds["tensor"].tolist() == [1, 1]
    module, number = kinds["both"]
    assert (type(module), number) == (RemoteModule, 5)
    assert module(kinds["tensor"]).shape == (2,)
    assert (type(kinds["lock"]), kinds["lock"].get("total")) == (RemoteObject, 2)
    del kinds, module
    assert [len(registry) for registry in held_by(session)] == [0]


def test_types_of_the_clients_own_go_to_and_fro(session: Session) -> None:
    class Point(NamedTuple):
        x: Any
        y: Any

    point = session.run(lambda point: Point(point.y, point.x.sum()), Point(session.ones(3), 2))
    assert type(point) is Point
    assert (point.x, point.y.item()) == (2, 3)


def test_an_object_is_freed_by_hand_and_when_it_is_collected(session: Session) -> None:
    module, other = session.module(nn.Linear, 2, 2), session.object(Tally)
    module.free()
    with pytest.raises(RemoteOpError, match="names nothing: it was freed"):
        module.state_dict()
    assert [len(registry) for registry in held_by(session)] == [1]
    del other
    assert [len(registry) for registry in held_by(session)] == [0]
