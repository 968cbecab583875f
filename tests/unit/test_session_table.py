"""Every function of raytorch's tables through handles, against PyTorch on local tensors."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from compared import assert_same
from in_process import local_session
from torch import Tensor, nn
from torch.nn import functional as F

from raytorch import autograd, distributed, tensor_ops
from raytorch.distributed import collectives
from raytorch.layers import LAYERS
from raytorch.losses import LOSSES
from raytorch.optimizers import OPTIMIZERS
from raytorch.session.remote_tensor import RemoteTensor
from raytorch.session.session import Session


@pytest.fixture
def session() -> Iterator[Session]:
    with local_session(1) as session:
        yield session


A, B = torch.randn(4, 3), torch.randn(4, 3)


def sent(session: Session, value: Any) -> Any:
    """``value`` with handles in place of its tensors."""
    if isinstance(value, Tensor):
        return session.tensor(value.detach().clone().requires_grad_(value.requires_grad))
    return type(value)(sent(session, part) for part in value) if isinstance(value, tuple | list) else value


# -- tensor operations -------------------------------------------------------------------------------------------------

OPERATIONS: dict[str, list[tuple[tuple[Any, ...], dict[str, Any], Callable[..., Any]]]] = {
    "add": [((A, B), {"alpha": 2}, lambda a, b, alpha: a + alpha * b)],
    "add_scalar": [((A, 2.5), {}, lambda a, number: a + number)],
    "sub": [((A, B), {}, lambda a, b: a - b)],
    "mul": [((A, B), {}, lambda a, b: a * b)],
    "mul_scalar": [((A, -3), {}, lambda a, number: a * number)],
    "div": [((A, B), {}, lambda a, b: a / b), ((A, 2), {"rounding_mode": "floor"}, lambda a, b, **_: a // b)],
    "matmul": [((A, B.T), {}, lambda a, b: a @ b)],
    "cos": [((A,), {}, lambda a: a.cos())],
    "max": [((A,), {}, lambda a: a.max()), ((A, 1), {}, lambda a, dim: a.max(dim)), ((A, B), {}, torch.maximum)],
    "min": [((A,), {}, lambda a: a.min()), ((A, 0), {}, lambda a, dim: a.min(dim)), ((A, B), {}, torch.minimum)],
    "std": [((A,), {}, lambda a: a.std()), ((A, 1), {"correction": 0}, lambda a, dim, **o: a.std(dim, **o))],
    "var": [((A,), {}, lambda a: a.var()), ((A,), {"dim": 0}, lambda a, dim: a.var(dim))],
    "norm": [((A,), {}, lambda a: a.square().sum().sqrt()), ((A, 1), {"dim": 1}, lambda a, p, dim: a.abs().sum(dim))],
    "gt": [((A, B), {}, lambda a, b: a > b), ((A, 0.5), {}, lambda a, number: a > number)],
    "index": [
        ((A, 2), {}, lambda a, row: a[row]),
        ((A, (slice(None), 1)), {}, lambda a, where: a[where]),
        ((A, torch.tensor([3, 0])), {}, lambda a, rows: a[rows]),
        ((A, [torch.tensor([1, 2]), torch.tensor([0, 2])]), {}, lambda a, where: a[where[0], where[1]]),
        ((A, A > 0), {}, lambda a, mask: a[mask]),
    ],
    "select": [((A, 1, 2), {}, lambda a, dim, place: a[:, place])],
    "narrow": [((A, 0, 1, 2), {}, lambda a, dim, start, length: a[start : start + length])],
    "stack": [(([A, B],), {"dim": 1}, lambda parts, dim: torch.cat([part.unsqueeze(dim) for part in parts], dim))],
}


def close(remote: Any, local: Any) -> None:
    """Handles of what PyTorch gives here, as near as another order of summation comes."""
    if isinstance(local, tuple):
        for left, right in zip(remote, local, strict=True):
            close(left, right)
    else:
        assert isinstance(remote, RemoteTensor)
        torch.testing.assert_close(remote.fetch(), local.detach())


def test_there_is_a_case_for_every_operation_loss_and_layer() -> None:
    assert OPERATIONS.keys() == tensor_ops.TENSOR_OPS.keys()
    assert LOSS_CASES.keys() == LOSSES.keys()
    assert LAYER_CASES.keys() == LAYERS.keys()


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_tensor_operation_on_handles_is_pytorchs(session: Session, name: str) -> None:
    for args, options, expected in OPERATIONS[name]:
        for _ in range(2):
            remote = tensor_ops.TENSOR_OPS[name](*sent(session, args), **options)
            close(remote, expected(*args, **options))


# -- losses ------------------------------------------------------------------------------------------------------------

LOGITS, CLASSES = torch.randn(6, 3), torch.tensor([0, 2, 1, 1, 0, 2])
ONE_HOT = F.one_hot(CLASSES, 3).float()
PROBABILITIES = LOGITS.sigmoid()
LOSS_CASES: dict[str, tuple[Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]]] = {
    "cross_entropy": (LOGITS, CLASSES, lambda x, y: -x.log_softmax(1)[range(6), y].mean()),
    "bce": (PROBABILITIES, ONE_HOT, lambda p, y: -(y * p.log() + (1 - y) * (1 - p).log()).mean()),
    "bce_with_logits": (LOGITS, ONE_HOT, lambda x, y: -(y * F.logsigmoid(x) + (1 - y) * F.logsigmoid(-x)).mean()),
    "mse": (LOGITS, ONE_HOT, lambda x, y: (x - y).square().mean()),
}


@pytest.mark.parametrize("name", LOSS_CASES)
def test_a_loss_of_handles_and_its_gradient_are_those_of_its_formula(session: Session, name: str) -> None:
    values, target, formula = LOSS_CASES[name]
    local = values.clone().requires_grad_()
    formula(local, target).backward()
    remote = session.tensor(values, requires_grad=True)
    loss = LOSSES[name](remote, session.tensor(target))
    loss.backward()
    close(loss, formula(values, target))
    close(remote.grad, local.grad)


# -- layers ------------------------------------------------------------------------------------------------------------


def image(dimensions: int) -> tuple[Tensor, ...]:
    return (torch.randn(2, 2, *[6] * dimensions),)


SEQUENCE = torch.randn(5, 2, 8)
LAYER_CASES: dict[str, tuple[tuple[Any, ...], tuple[Tensor, ...]]] = {
    **{f"Conv{n}d": ((2, 3, 3), image(n)) for n in (1, 2, 3)},
    **{f"ConvTranspose{n}d": ((2, 3, 3), image(n)) for n in (1, 2, 3)},
    **{f"{kind}Pool{n}d": ((2,), image(n)) for kind in ("Max", "Avg") for n in (1, 2, 3)},
    **{f"Adaptive{kind}Pool{n}d": ((3,), image(n)) for kind in ("Max", "Avg") for n in (1, 2, 3)},
    **{f"BatchNorm{n}d": ((2,), image(n)) for n in (1, 2, 3)},
    **dict.fromkeys(("RNN", "LSTM", "GRU"), ((8, 4), (SEQUENCE,))),
    "MultiheadAttention": ((8, 2), (SEQUENCE, SEQUENCE + 1, SEQUENCE - 1)),
    "PositionalEncoding": ((8,), (SEQUENCE,)),
    "TransformerEncoderLayer": ((8, 2, 16, 0.0), (SEQUENCE,)),
    "TransformerDecoderLayer": ((8, 2, 16, 0.0), (SEQUENCE, SEQUENCE + 1)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_on_the_workers_gives_what_it_gives_here(session: Session, name: str) -> None:
    arguments, inputs = LAYER_CASES[name]
    local: nn.Module = LAYERS[name](*arguments)
    remote = session.module(LAYERS[name], *arguments)
    remote.load_state_dict(local.state_dict())
    expected, given = local(*inputs), remote(*sent(session, inputs))
    first = given[0] if isinstance(expected, tuple) else given
    assert_same(first, expected[0] if isinstance(expected, tuple) else expected)
    assert {name: tensor.shape for name, tensor in remote.state_dict().items()} == {
        name: tensor.shape for name, tensor in local.state_dict().items()
    }


# -- optimizers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_of_handles_steps_as_pytorchs_class_of_that_name(session: Session, name: str) -> None:
    theirs = {each.__name__.lower(): each for each in vars(torch.optim).values() if inspect.isclass(each)}
    local = A.clone().requires_grad_()
    remote = session.tensor(A, requires_grad=True)
    mine = session.optimizer(name, [remote], lr=0.05)
    other = theirs[name]([local], lr=0.05)
    for weights, optimizer in ((remote, mine), (local, other)):
        for _ in range(5):
            optimizer.zero_grad()
            (weights**2 - weights).sum().backward()
            optimizer.step()
    assert_same(remote, local)


# -- autograd ----------------------------------------------------------------------------------------------------------


def test_backward_and_grad_of_raytorch_differentiate_handles(session: Session) -> None:
    def use(leaf: Any) -> list[Any]:
        (first,) = autograd.grad((leaf**3).sum(), leaf, create_graph=True)
        autograd.backward([first.sum(), (leaf * 2).sum()])
        return [first.detach(), leaf.grad]

    local = A.clone().requires_grad_()
    assert_same(use(session.tensor(A, requires_grad=True)), use(local))


def test_a_local_custom_function_is_not_needed_for_one_of_handles(session: Session) -> None:
    def forward(context: Any, x: Tensor) -> Tensor:
        context.save_tensor(x)
        return x.exp()

    def backward(context: Any, grad: Tensor) -> Tensor:
        return grad * context.saved_tensors[0].exp()

    def use(function: Any, leaf: Any) -> list[Any]:
        output = function.apply(leaf)
        output.sum().backward()
        return [output.detach(), leaf.grad]

    local = use(autograd.CustomFunction(forward, backward), A.clone().requires_grad_())
    assert_same(use(session.function(forward, backward), session.tensor(A, requires_grad=True)), local)
    assert torch.equal(local[1], A.exp())


def test_checkpoint_of_raytorch_takes_handles(session: Session) -> None:
    def use(leaf: Any, run: Callable[..., Any]) -> list[Any]:
        output = run(torch.tanh, leaf)
        output.sum().backward()
        return [output.detach(), leaf.grad]

    local = use(A.clone().requires_grad_(), lambda function, leaf: function(leaf))
    assert_same(use(session.tensor(A, requires_grad=True), autograd.checkpoint), local)
    assert_same(use(session.tensor(A, requires_grad=True), session.checkpoint), local)


# -- distributed: alone, a group of one; see tests/integration/session/test_session.py for more ------------------------


@pytest.mark.parametrize("op", ["sum", "mean", "product", "min", "max"])
def test_a_reduction_over_a_group_of_one_is_the_tensor_itself(session: Session, op: str) -> None:
    tensor = session.tensor(A)
    assert_same(collectives.all_reduce(tensor, op), A)
    assert_same(tensor, A)
    assert_same(collectives.reduce_scatter(tensor, op), A)
    assert_same(collectives.reduce_scatter([tensor], op=op), A)


def test_the_other_collectives_of_a_group_of_one_give_the_tensor(session: Session) -> None:
    tensor = session.tensor(A)
    assert_same(collectives.all_gather(tensor), A[None])
    assert_same(collectives.broadcast(tensor, 0), A)
    session.barrier()
    assert session.run(distributed.is_available) is distributed.is_available()
    try:
        session.run(distributed.init_process_group, "gloo", timeout_s=20)
        assert session.run(torch.distributed.get_world_size) == 1
        assert_same(collectives.all_reduce(tensor), A)
    finally:
        session.run(distributed.destroy_process_group)
    assert session.run(torch.distributed.is_initialized) is False
