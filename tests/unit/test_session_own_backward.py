"""Functions with a backward pass of one's own, on handles: what PyTorch gives for local tensors, gradients included."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from compared import assert_same
from in_process import local_session
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from raytorch.errors import RemoteOpError, SessionError
from raytorch.session.session import Session


@pytest.fixture
def session() -> Iterator[Session]:
    with local_session(1) as session:
        yield session


class Reversing(Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return -grad


class Identity(Function):
    """Makes no call that a session could record."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad * 5


class StraightThrough(Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad


class Cubing(Function):
    """Saves its input, and can be differentiated twice."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (x,) = ctx.saved_tensors
        return grad * 3 * x**2 * 2  # twice the true one, as a mark


class Scaling(Function):
    """Takes what is no tensor, by default too, and sets up its context apart."""

    @staticmethod
    def forward(x: Any, factor: float, words: Any = ("plus", 1)) -> Any:
        return x * factor + words[1]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad * ctx.factor * 10, None, None


class SumAndLargest(Function):
    """Has several outputs, of which one has no gradient, and inputs that need none."""

    @staticmethod
    def forward(ctx: Any, x: Any, y: Any) -> Any:
        where = x.argmax()
        ctx.mark_non_differentiable(where)
        ctx.needed = ctx.needs_input_grad
        return x + y, where, x - y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any, _: Any, other: Any) -> Any:
        assert ctx.needed == (True, False)
        return grad * 2 + other * 3, None


class Dirty(Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        ctx.mark_dirty(x)
        return x.mul_(3)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad * 7


named_early = Identity.apply  # by then there is no session
DATA = torch.tensor([1.0, 2.25])


def twice_differentiated(x: Any) -> Any:
    (first,) = torch.autograd.grad(Cubing.apply(x).sum(), x, create_graph=True)
    return first


def several(x: Any) -> Any:
    total, where, difference = SumAndLargest.apply(x, x.detach() * 2)
    assert not where.requires_grad
    return total * 2 + difference + where


def in_place(x: Any) -> Any:
    changed = x * 2
    return Dirty.apply(changed) + changed


USES: dict[str, Callable[[Any], Any]] = {
    "reversing": lambda x: Reversing.apply(x).pow(2).sum() + x.sum(),
    "no call in forward": lambda x: Identity.apply(x) * x,
    "straight-through": lambda x: StraightThrough.apply(x) * x,
    "saved tensors": lambda x: Cubing.apply(x),
    "twice": twice_differentiated,
    "other arguments": lambda x: Scaling.apply(x, 4.0) + Scaling.apply(x, 0.5, ["and", 2]),
    "several outputs": several,
    "in place": in_place,
    "one inside another": lambda x: Reversing.apply(Cubing.apply(x)),
    "reentrant checkpoint": lambda x: checkpoint(torch.exp, x * 2, use_reentrant=True),
    "a function of several": lambda x: checkpoint(lambda a, b: (a * b, a + b), x, x * 3, use_reentrant=True)[0],
    "reentrant checkpoint in parts": lambda x: checkpoint_sequential([torch.exp, torch.sin], 2, x, use_reentrant=True),
}


@pytest.mark.parametrize("name", USES)
def test_backward_is_the_functions_own(session: Session, name: str) -> None:
    for _ in range(2):
        remote, local = session.tensor(DATA, requires_grad=True), DATA.clone().requires_grad_()
        mine, theirs = USES[name](remote), USES[name](local)
        assert_same(mine, theirs)
        mine.sum().backward()
        theirs.sum().backward()
        assert_same(remote.grad, local.grad)


def test_an_error_in_backward_or_forward_is_the_functions_own(session: Session) -> None:
    class Failing(Function):
        @staticmethod
        def forward(ctx: Any, x: Any, fails: bool) -> Any:
            if fails:
                raise LookupError("in forward")
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            raise LookupError("in backward")

    leaf = session.tensor(DATA, requires_grad=True)
    with pytest.raises(RemoteOpError, match=r"Failing, float32\[2\], True\) failed on rank 0[^!]*in forward"):
        Failing.apply(leaf, True).fetch()
    Failing.apply(leaf, False).sum().backward()
    with pytest.raises(RemoteOpError, match="in backward"):
        session.synchronize()


def test_local_tensors_go_on_as_they_were(session: Session) -> None:
    local = DATA.clone().requires_grad_()
    output = Cubing.apply(local)
    assert output.grad_fn.name() == "CubingBackward"
    output.sum().backward()
    assert torch.equal(local.grad, 6 * DATA**2)


def test_a_handle_that_is_no_argument_is_refused(session: Session) -> None:
    weight = session.tensor(DATA, requires_grad=True)

    class ByClosure(Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return weight * 2 if x is None else weight * x

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            return grad

    for argument in (None, torch.ones(2), session.ones(2)):
        with pytest.raises(SessionError, match=r"a handle (that is none of its arguments|cannot be pickled)"):
            ByClosure.apply(argument)
    with pytest.raises(SessionError, match="a handle cannot be pickled: pass it on its own"):
        checkpoint(lambda x: x * weight, session.ones(2), use_reentrant=True)


def test_a_name_for_apply_is_refused_if_it_was_given_before_the_session_began(session: Session) -> None:
    with pytest.raises(SessionError, match=r"call Identity.apply\(\) itself, or name it later"):
        named_early(session.ones(2))
    named_now = Identity.apply
    leaf = session.tensor(DATA, requires_grad=True)
    named_now(leaf).sum().backward()
    assert leaf.grad.tolist() == [5, 5]
    assert named_early(torch.ones(2)).tolist() == [1, 1]


def test_a_module_on_the_workers_is_checkpointed_either_way(session: Session) -> None:
    net = session.module(nn.Sequential, nn.Linear(2, 2), nn.Tanh())
    local = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    net.load_state_dict(local.state_dict())
    for run in (lambda x: checkpoint(net, x, use_reentrant=True), lambda x: session.checkpoint(net, x)):
        net.zero_grad()
        local.zero_grad()
        remote, here = session.tensor(DATA, requires_grad=True), DATA.clone().requires_grad_()
        run(remote).sum().backward()
        local(here).sum().backward()
        assert_same(remote.grad, here.grad)
        for name, parameter in net.named_parameters().items():
            assert_same(parameter.grad, local.get_parameter(name).grad)


def test_a_plain_functions_result_on_its_own_is_not_looked_into(session: Session) -> None:
    class Sizes(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Any:
            return x * 1, {"size": x.numel()}

        @staticmethod
        def backward(ctx: Any, grad: Any, _: Any) -> Any:
            return grad

    assert Sizes.apply(session.ones(2))[1] == Sizes.apply(torch.ones(2))[1] == {"size": 2}
