"""Modules, optimizers and schedulers, driven by handles and compared with PyTorch's own."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from compared import assert_same
from in_process import local_session
from torch import Tensor, nn
from torch.nn import functional as F

from raytorch.errors import RemoteOpError
from raytorch.layers import attention, conv, rnn, transformer
from raytorch.optimizers import OPTIMIZERS
from raytorch.session.remote_objects import RemoteModule
from raytorch.session.remote_tensor import RemoteTensor
from raytorch.session.session import Session


@pytest.fixture
def session() -> Iterator[Session]:
    with local_session(1) as session:
        yield session


class Gated(nn.Module):
    """A module of the user's own, with a buffer, two outputs and a method."""

    def __init__(self, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width))
        self.gate = nn.Parameter(torch.ones(width))
        self.scale = scale

    def forward(self, x: Tensor, *, shift: float = 0.0) -> tuple[Tensor, dict[str, Any]]:
        hidden = self.inner(x) * self.gate
        return hidden * self.scale + shift, {"hidden": hidden, "width": hidden.shape[1]}

    def norm(self, power: float) -> Tensor:
        return self.gate.norm(power)


class WithAuxiliary(nn.Module):
    """Has a second output in training, as GoogLeNet has."""

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return (x, 2 * x) if self.training else x


def pair(session: Session, factory: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> tuple[RemoteModule, Any]:
    """The same module remote and local."""
    local = factory(*args, **kwargs)
    remote = session.module(factory, *args, **kwargs)
    remote.load_state_dict(local.state_dict())
    return remote, local


def assert_same_state(remote: Any, local: Any) -> None:
    """State dicts are equal to the bit, whatever their nesting."""
    if isinstance(local, dict):
        assert list(remote) == list(local)
        for key in local:
            assert_same_state(remote[key], local[key])
    elif isinstance(local, list | tuple):
        assert len(remote) == len(local)
        for left, right in zip(remote, local, strict=True):
            assert_same_state(left, right)
    elif isinstance(local, Tensor):
        assert isinstance(remote, Tensor)
        torch.testing.assert_close(remote, local.detach(), rtol=0, atol=0)
    else:
        assert remote == local


# -- modules -----------------------------------------------------------------------------------------------------------

SEQUENCE = torch.randn(5, 2, 8)
MODULES: dict[str, tuple[Callable[..., nn.Module], tuple[Any, ...], tuple[Tensor, ...]]] = {
    "Linear": (nn.Linear, (8, 3), (SEQUENCE,)),
    "Conv3d": (conv.Conv3d, (2, 3, 2), (torch.randn(1, 2, 4, 4, 4),)),
    "LSTM": (rnn.LSTM, (8, 4), (SEQUENCE,)),
    "GRU": (rnn.GRU, (8, 4), (SEQUENCE,)),
    "RNN": (rnn.RNN, (8, 4), (SEQUENCE,)),
    "MultiheadAttention": (attention.MultiheadAttention, (8, 2), (SEQUENCE, SEQUENCE, SEQUENCE)),
    "PositionalEncoding": (attention.PositionalEncoding, (8,), (SEQUENCE,)),
    "TransformerEncoderLayer": (transformer.TransformerEncoderLayer, (8, 2, 16, 0.0), (SEQUENCE,)),
    "TransformerDecoderLayer": (transformer.TransformerDecoderLayer, (8, 2, 16, 0.0), (SEQUENCE, SEQUENCE)),
    "of the user's own": (Gated, (8, 2.0), (SEQUENCE[:, 0],)),
    "by a function": (lambda width: nn.Sequential(nn.Linear(width, 4), nn.Tanh()), (8,), (SEQUENCE,)),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_gives_what_it_gives_here_and_its_gradients(session: Session, name: str) -> None:
    factory, args, inputs = MODULES[name]
    remote, local = pair(session, factory, *args)
    for _ in range(2):
        sent = {id(tensor): session.tensor(tensor) for tensor in inputs}  # once, as self-attention tells by identity
        outputs, expected = remote(*(sent[id(tensor)] for tensor in inputs)), local(*inputs)
        assert structure(outputs) == structure(expected)
        for left, right in zip(tensors_in(outputs), tensors_in(expected), strict=True):
            assert_same(left, right)
        if list(local.parameters()):
            tensors_in(outputs)[0].square().sum().backward()
            tensors_in(expected)[0].square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in remote.named_parameters().items()}
    assert list(gradients) == [name for name, _ in local.named_parameters()]
    for name, parameter in local.named_parameters():
        if parameter.grad is None:
            assert gradients[name] is None
        else:
            assert_same(gradients[name], parameter.grad)
    assert_same_state(remote.state_dict(), dict(local.state_dict()))


def tensors_in(value: Any) -> list[Any]:
    if isinstance(value, Tensor | RemoteTensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else []
    return [tensor for part in parts for tensor in tensors_in(part)]


def structure(value: Any) -> Any:
    if isinstance(value, Tensor | RemoteTensor):
        return "tensor"
    if isinstance(value, dict):
        return {key: structure(part) for key, part in value.items()}
    return [type(value), *map(structure, value)] if isinstance(value, tuple | list) else value


def test_a_modules_methods_attributes_and_keywords_are_reached(session: Session) -> None:
    remote, local = pair(session, Gated, 8, scale=3.0)
    x = SEQUENCE[:, 0]
    assert_same(remote(session.tensor(x), shift=2.0)[0], local(x, shift=2.0)[0])
    assert_same(remote.call("norm", 1.0), local.norm(1.0))
    assert_same(remote.call("inner.forward", session.tensor(x)), local.inner(x))
    assert (remote.get("scale"), remote.get("inner.0.in_features")) == (3.0, 8)
    remote.set("scale", 5.0)
    local.scale = 5.0
    assert remote.get("scale") == 5.0
    assert_same(remote(session.tensor(x))[0], local(x)[0])
    assert_same(remote.get("gate"), local.gate)
    assert isinstance(remote.get("inner"), RemoteModule)
    assert_same(F.linear(session.tensor(x), *remote.get("inner.0").parameters()), local.inner[0](x))


def test_training_and_evaluation_mode_are_set(session: Session) -> None:
    remote, local = pair(session, nn.Sequential, nn.BatchNorm1d(4), nn.Dropout(0.5))
    x = torch.randn(6, 4)
    assert remote.get("training") is True
    for mode in (False, True):
        assert remote.train(mode) is remote
        local.train(mode)
        session.manual_seed(3)
        output = remote(session.tensor(x)).fetch()
        torch.manual_seed(3)
        assert torch.equal(output, local(x))
    remote.eval()
    assert remote.get("1.training") is False
    assert_same_state(remote.state_dict(), dict(local.state_dict()))


def test_an_lstm_runs_in_autocast_whatever_types_the_processor_has_it_in(session: Session) -> None:
    module, rows = session.module(nn.LSTM, 4, 3), session.ones(5, 2, 4)
    expected = module(rows)[0].fetch()
    with torch.autocast("cpu", torch.float16):
        states, _ = module(rows)
    states.float().sum().backward()
    torch.testing.assert_close(states.float().fetch(), expected, rtol=0.05, atol=0.05)


def test_a_module_may_give_something_else_in_evaluation_mode(session: Session) -> None:
    module, x = session.module(WithAuxiliary), session.ones(2)
    for _ in range(3):
        output, auxiliary = module.train()(x)
        assert (output.tolist(), auxiliary.tolist()) == ([1, 1], [2, 2])
        assert module.eval()(x).tolist() == [1, 1]
        assert module(x).tolist() == [1, 1]


def test_parameters_are_tensors_that_train_and_can_be_frozen(session: Session) -> None:
    remote, local = pair(session, nn.Linear, 3, 2)
    weight, bias = remote.parameters()
    assert (weight.requires_grad, bias.shape) == (True, (2,))
    assert remote.requires_grad_(False) is remote
    assert weight.requires_grad is False
    remote.requires_grad_()
    remote(session.ones(1, 3)).sum().backward()
    assert weight.grad is not None
    remote.zero_grad()
    assert weight.grad is None
    with torch.no_grad():
        weight *= 2
    assert_same(remote(session.ones(1, 3)), F.linear(torch.ones(1, 3), local.weight * 2, local.bias))


def test_a_lazy_module_is_listed_before_and_after_it_knows_its_shape(session: Session) -> None:
    module = session.module(nn.LazyLinear, 2)
    parameters = list(module.parameters())
    for shapes in ([None, None], [(2, 3), (2,)]):
        assert [found["shape"] for found in session.handles() if found["kind"] == "tensor"] == shapes
        assert module(session.ones(1, 3)).shape == (1, 2)
    assert session.stats()[0]["module"]["bytes"] == {"cpu": 32}
    assert parameters[0].shape == (2, 3)


def test_a_state_that_does_not_fit_is_refused_with_the_modules_own_words(session: Session) -> None:
    remote = session.module(nn.Linear, 3, 2)
    with pytest.raises(RemoteOpError, match="Missing key"):
        remote.load_state_dict({"weight": torch.ones(2, 3)})
    remote.load_state_dict({"weight": torch.ones(2, 3)}, strict=False)
    assert torch.equal(remote.state_dict()["weight"], torch.ones(2, 3))


# -- optimizers and schedulers -----------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "rmsprop": {"lr": 0.01, "alpha": 0.9, "momentum": 0.5, "centered": True},
    "sgd": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "adam": {"lr": 0.02, "betas": (0.8, 0.95), "amsgrad": True},
    "adamw": {"lr": 0.02, "weight_decay": 0.1},
    "asgd": {"lr": 0.02, "t0": 2},
    "nadam": {"lr": 0.02, "momentum_decay": 0.1},
    "radam": {"lr": 0.02, "weight_decay": 0.1},
    "adamax": {"lr": 0.02, "betas": (0.8, 0.95)},
    "adafactor": {"lr": 0.02, "d": 1.5},
    "adagrad": {"lr": 0.02, "initial_accumulator_value": 0.1},
    "adadelta": {"lr": 0.5, "rho": 0.8},
    "rprop": {"lr": 0.02, "step_sizes": (1e-4, 0.1)},
    "muon": {"lr": 0.02, "weight_decay": 0.01},
}


def descend(module: Any, optimizer: Any, data: Any, target: Any, steps: int, scheduler: Any = None) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(module(data), target).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(16, 6, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 3


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))


def matrices() -> nn.Module:
    """What Muon trains alone."""
    return nn.Sequential(nn.Linear(6, 10, bias=False), nn.Tanh(), nn.Linear(10, 3, bias=False))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_takes_pytorchs_steps_and_its_state_goes_both_ways(session: Session, name: str) -> None:
    (remote, local), (data, target) = pair(session, matrices if name == "muon" else net), batch()
    mine = session.optimizer(name, remote.parameters(), **OPTIONS[name])
    theirs = OPTIMIZERS[name](local.parameters(), **OPTIONS[name])
    there = session.tensor(data), session.tensor(target)
    descend(remote, mine, *there, steps=3)
    descend(local, theirs, data, target, steps=3)
    assert_same_state(mine.state_dict(), theirs.state_dict())

    fresh = session.optimizer(OPTIMIZERS[name], list(remote.parameters()), lr=7.0)
    fresh.load_state_dict(theirs.state_dict())
    assert fresh.lr == OPTIONS[name]["lr"]
    fresh.lr = 0.005
    theirs.param_groups[0]["lr"] = 0.005
    descend(remote, fresh, *there, steps=2)
    descend(local, theirs, data, target, steps=2)
    assert_same_state(fresh.state_dict(), theirs.state_dict())
    assert_same_state(remote.state_dict(), dict(local.state_dict()))


def test_gradients_are_set_to_none_or_to_zero(session: Session) -> None:
    weight = session.tensor([2.0], requires_grad=True)
    optimizer = session.optimizer("sgd", [weight], lr=0.1)
    for set_to_none in (True, False):
        (weight * 3).sum().backward()
        optimizer.zero_grad(set_to_none)
        assert weight.grad is None if set_to_none else weight.grad.item() == 0


def test_a_scheduler_sets_the_rates_that_it_sets_here(session: Session) -> None:
    (remote, local), (data, target) = pair(session, net), batch()
    mine = session.optimizer("sgd", remote.parameters(), lr=1.0)
    theirs = torch.optim.SGD(local.parameters(), lr=1.0)
    remote_schedule = session.scheduler(torch.optim.lr_scheduler.StepLR, mine, step_size=2, gamma=0.5)
    local_schedule = torch.optim.lr_scheduler.StepLR(theirs, step_size=2, gamma=0.5)
    descend(remote, mine, session.tensor(data), session.tensor(target), steps=5, scheduler=remote_schedule)
    descend(local, theirs, data, target, steps=5, scheduler=local_schedule)
    assert remote_schedule.get_last_lr() == local_schedule.get_last_lr() == [0.25]
    assert mine.lr == 0.25
    assert_same_state(remote.state_dict(), dict(local.state_dict()))


def test_a_net_of_handles_trained_by_rmsprop_ends_with_pytorchs_weights_to_the_bit(session: Session) -> None:
    def train(source: Any, optimizer_of: Callable[[list[Any]], Any]) -> list[Any]:
        source.manual_seed(11)
        sizes = [(12, 6), (12,), (3, 12), (3,)]
        weights = [(source.randn(*size) * 0.3).requires_grad_() for size in sizes]
        data, target = source.randn(32, 6), source.randint(0, 3, (32,))
        optimizer = optimizer_of(weights)
        for _ in range(50):
            hidden = torch.relu(F.linear(data, weights[0], weights[1]))
            loss = F.cross_entropy(hidden @ weights[2].T + weights[3], target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return [*weights, loss]

    by_handles = train(session, lambda weights: session.optimizer("rmsprop", weights, lr=0.01))
    by_handles = [tensor.fetch() for tensor in by_handles]
    here = train(torch, lambda weights: torch.optim.RMSprop(weights, lr=0.01))
    assert here[-1] < 0.7  # it learns
    for left, right in zip(by_handles, here, strict=True):
        assert torch.equal(left, right)
