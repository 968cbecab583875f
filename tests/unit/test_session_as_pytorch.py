"""What a user of PyTorch takes for granted: it holds in a session too, or is refused at the call with the way out."""

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from in_process import local_session
from torch import Tensor, nn

from raytorch.errors import RemoteOpError, SessionError
from raytorch.session.program import Modes
from raytorch.session.session import Session


@pytest.fixture
def session() -> Iterator[Session]:
    with local_session() as session:
        yield session


# -- containers keep their types ---------------------------------------------------------------------------------------


def test_an_optimizers_state_has_the_types_that_it_has(session: Session) -> None:
    weight = session.ones(2, requires_grad=True)
    optimizer = session.optimizer("adam", [weight], betas=(0.8, 0.9))
    local = torch.optim.Adam([torch.ones(2, requires_grad=True)], betas=(0.8, 0.9))
    assert optimizer.state_dict() == local.state_dict()
    assert type(optimizer.state_dict()["param_groups"][0]["betas"]) is tuple
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state_dict() == local.state_dict()


class WithExtraState(nn.Linear):
    """Has a state that is no tensor."""

    def get_extra_state(self) -> Any:
        return {"scales": (1, 2.0), "means": [torch.ones(1)]}

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def test_a_modules_state_has_the_types_that_it_has(session: Session) -> None:
    state = session.module(WithExtraState, 2, 2).state_dict()
    assert type(state) is OrderedDict
    assert state["_extra_state"]["scales"] == (1, 2.0)
    assert torch.equal(state["_extra_state"]["means"][0], torch.ones(1))


def given() -> Any:
    return OrderedDict(b=(1, [2, (3,)]), a=torch.Size([4]))


def test_results_have_the_types_that_they_have(session: Session) -> None:
    assert repr(session.run(given)) == repr(given())


# -- modules -----------------------------------------------------------------------------------------------------------


class Growing(nn.Module):
    """Gives a tensor at first, and a tuple from the second call on, or from when it is told to."""

    def __init__(self, calls: int = 1) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, x: Tensor) -> Any:
        self.calls -= 1
        return x if self.calls >= 0 else (x, 2 * x)


class Around(nn.Module):
    """Gives what the module in it gives."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


class InTraining(nn.Module):
    """Gives a tuple in training alone."""

    def forward(self, x: Tensor) -> Any:
        return (x, x) if self.training else x


def test_a_module_that_gives_something_else_by_itself_is_told_with_the_way_out(session: Session) -> None:
    net, x = session.module(Growing), session.ones(2)
    assert net(x).tolist() == [1, 1]
    with pytest.raises(RemoteOpError, match=r"gave a tuple .* session.run\(lambda net, x: net\(x\), net, x\)"):
        net(x).tolist()
    assert [part.tolist() for part in net(x)] == [[1, 1], [2, 2]]  # from then on it is known


CHANGES: dict[str, Callable[[Session, Any, Any], Any]] = {
    "train": lambda session, net, inner: inner.train(),
    "set": lambda session, net, inner: inner.set("training", True),
    "run": lambda session, net, inner: session.run(nn.Module.train, inner),
    "run on the outer": lambda session, net, inner: session.run(nn.Module.train, net),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_module_is_asked_again_after_what_may_have_changed_it(session: Session, name: str) -> None:
    inner = session.module(InTraining).eval()
    net, x = session.module(Around, inner), session.ones(1)
    for _ in range(2):
        assert net(x).tolist() == [1]
    CHANGES[name](session, net, inner)
    assert [part.tolist() for part in net(x)] == [[1], [1]]


REFUSED: dict[str, Callable[[Session], Any]] = {
    "module": lambda session: session.module(nn.Linear(2, 2)),
    "module on the workers": lambda session: session.module(session.module(nn.Linear, 2, 2)),
    "module by name": lambda session: session.module("linear"),
    "optimizer": lambda session: session.optimizer(
        torch.optim.SGD([torch.ones(1)], lr=1.0), [session.ones(1, requires_grad=True)]
    ),
    "scheduler": lambda session: session.scheduler(
        torch.optim.lr_scheduler.StepLR, torch.optim.SGD([torch.ones(1)], lr=1.0), step_size=1
    ),
    "object": lambda session: session.object([]),
    "function": lambda session: session.function(lambda ctx, x: x, None),
    "ddp": lambda session: session.ddp(nn.Linear(2, 2)),
    "optimizer of local parameters": lambda session: session.optimizer("sgd", nn.Linear(2, 2).parameters()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_made_already_is_refused_at_the_call(session: Session, name: str) -> None:
    with pytest.raises(SessionError) as caught:
        REFUSED[name](session)
    assert not isinstance(caught.value, RemoteOpError)
    session.synchronize()


def test_a_function_that_returns_a_module_sends_a_copy(session: Session) -> None:
    net = nn.Linear(2, 2)
    assert torch.equal(session.module(lambda: net).state_dict()["weight"], net.weight)


# -- the default dtype -------------------------------------------------------------------------------------------------


@pytest.fixture
def doubles() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("doubles")
def test_the_default_dtype_reaches_the_workers(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    transport: Any = session._transport
    execute = transport.interpreters[0].execute

    def executed_elsewhere(*args: Any) -> Any:  # another process has a default of its own
        torch.set_default_dtype(torch.float32)
        try:
            return execute(*args)
        finally:
            torch.set_default_dtype(torch.float64)

    monkeypatch.setattr(transport.interpreters[0], "execute", executed_elsewhere)
    for _ in range(2):
        assert session.randn(2).dtype == torch.float64
        assert session.module(nn.Linear, 2, 2).get("weight.dtype") == torch.float64
        assert (session.tensor([1]) / 2).dtype == torch.float64
        assert session.run(torch.get_default_dtype) == torch.float64
    torch.set_default_dtype(torch.float32)
    assert Modes.current().dtype == torch.float32
    assert session.randn(2).dtype == torch.float32


# -- uploaded tensors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 1000, 200_000])
def test_an_uploaded_tensor_can_be_resized(session: Session, length: int) -> None:
    x = session.tensor(torch.ones(length))
    assert x.resize_(length + 2).shape == (length + 2,)
    assert x[:length].sum().item() == length
    out = session.tensor(torch.ones(0))
    torch.add(session.ones(3), 1, out=out)
    assert out.tolist() == [2, 2, 2]


@pytest.mark.parametrize("how", ["in place", "out", "function"])
def test_a_large_uploaded_tensor_says_how_it_can_be_resized(session: Session, how: str) -> None:
    """Its memory is not PyTorch's own, which takes several times as long to fill; PyTorch would read beyond it."""
    x, other = session.tensor(torch.ones(400_000)), session.ones(3)
    resize: dict[str, Callable[[], Any]] = {
        "in place": lambda: x.resize_(500_000),
        "out": lambda: torch.cat([session.ones(500_000)], out=x),
        "function": lambda: session.run(grow, x),
    }
    for ask in (lambda: [resize[how](), session.synchronize()], lambda: x.sum().item(), lambda: x[3].item()):
        with pytest.raises(RemoteOpError, match=r"storage that is not resizable; .* a copy of it, x = x\.clone\(\)"):
            ask()
    assert other.tolist() == [1, 1, 1]
    x = session.tensor(torch.ones(400_000)).clone()
    assert x.resize_(500_000)[:400_000].sum().item() == 400_000


def grow(x: Tensor) -> None:
    x.resize_(500_000)


# -- hooks -------------------------------------------------------------------------------------------------------------

SEEN: list[Any] = []
COUNT = 0
SCALE, WEIGHTS = 3.0, torch.tensor([1.0, 2.0])


def note(value: Any) -> None:
    SEEN.append(value)


def count(grad: Tensor) -> None:
    global COUNT
    COUNT += 1


class Notes:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def keep(self, grad: Tensor) -> None:
        self.kept.append(grad)


def local_hooks() -> dict[str, Callable[..., Any]]:
    seen: list[Any] = []
    total = 0.0

    def add(grad: Tensor) -> None:
        nonlocal total
        total += 1

    return {
        "a list's method": seen.append,
        "a list of the function around": lambda grad: seen.append(grad),
        "a variable of the function around": add,
        "a global list": lambda grad: SEEN.append(grad),
        "a global variable": count,
        "a function with a global list": lambda grad: note(grad),
        "an object's method": Notes().keep,
        "a partial function": functools.partial(lambda kept, grad: kept.append(grad), seen),
    }


@pytest.mark.parametrize("name", local_hooks())
def test_a_hook_whose_effects_nobody_would_see_is_refused(session: Session, name: str) -> None:
    x, net = session.ones(2, requires_grad=True), session.module(nn.Linear, 2, 2)
    hook = local_hooks()[name]
    for register in (
        lambda: x.register_hook(hook),
        lambda: x.register_post_accumulate_grad_hook(hook),
        lambda: net.call("register_forward_hook", hook),
    ):
        with pytest.raises(SessionError, match="nobody here would see what it changes"):
            register()


def test_a_hook_that_gives_what_it_changes_works(session: Session) -> None:
    x = session.ones(2, requires_grad=True)
    handle = x.register_hook(lambda grad: torch.clamp(grad * SCALE * WEIGHTS, max=5.0))
    x.sum().backward()
    assert x.grad.tolist() == [3, 5]
    handle.call("remove")
    x.sum().backward()
    assert x.grad.tolist() == [4, 6]


def installed(net: nn.Module, notes: list[Any]) -> None:
    net.register_forward_hook(lambda module, args, output: notes.append(tuple(output.shape)))


def test_the_way_out_of_a_refused_hook(session: Session) -> None:
    net, notes = session.module(nn.Linear, 2, 3), session.object(list)
    session.run(installed, net, notes)
    net(session.ones(4, 2)).sum().item()
    assert notes.call("copy") == [(4, 3)]
