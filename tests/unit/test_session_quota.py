"""What exceeds a session's quota fails, whenever it comes to be held, and the session lives on."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from in_process import local_session, registries
from torch import Tensor, nn
from torch.nn import functional as F

from raytorch.errors import RemoteOpError
from raytorch.session.session import Session

KIB = 1024
"""Bytes of ``square()``, and of its gradient."""


def caught(use: Callable[[], Any]) -> RemoteOpError:
    with pytest.raises(RemoteOpError) as info:
        use()
    return info.value


def square() -> nn.Module:
    """A weight of 16 x 16 numbers."""
    return nn.Linear(16, 16, bias=False)


def in_use(session: Session) -> int:
    """The bytes that count against the quota, which must be those that a fresh count of all handles finds."""
    session.synchronize()
    (registry,) = registries(session)
    total: int = registry._storages._total
    assert total == sum(sum(kind["bytes"].values()) for kind in registry.stats().values())
    return total


@pytest.fixture
def session() -> Iterator[Session]:
    """One that holds two weights and a half."""
    with local_session(1, max_bytes=2 * KIB + KIB // 2) as session:
        yield session


def test_what_exceeds_the_quota_fails_and_the_session_lives_on() -> None:
    with local_session(2, max_bytes=4800) as session:
        first = session.zeros(512)
        big = session.zeros(1024)
        error = caught(big.fetch)
        assert error.operation == "torch.zeros"
        assert "QuotaError: 4,096 bytes more would exceed the session's quota: 2,048 of 4,800 bytes" in str(error)
        assert caught((big + 1).fetch).operation == "torch.zeros"
        doubled = first + 1
        assert doubled.sum().item() == 512
        del doubled
        session.synchronize()
        for _ in range(20):
            first = first.add(1)
            assert first[0].item() >= 1
        with pytest.raises(RemoteOpError, match="QuotaError"):
            session.tensor(torch.zeros(2048)).fetch()
        first.free()
        assert session.zeros(1000).sum().item() == 0


# -- what comes to be held later ---------------------------------------------------------------------------------------


def test_gradients_and_optimizer_state_count_from_when_they_are_there(session: Session) -> None:
    net = session.module(square)
    optimizer = session.optimizer("sgd", net.parameters(), lr=0.1, momentum=0.9)
    data = session.ones(1, 16)
    assert in_use(session) == KIB + 64
    net(data).sum().backward()
    assert in_use(session) == 2 * KIB + 64
    optimizer.step()
    error = caught(session.synchronize)
    assert error.operation == "raytorch.session.method"
    assert "QuotaError: 1,024 bytes more" in str(error)
    assert "3,136 of 2,560 bytes are in use" in str(error)
    assert "zero_grad()" in str(error)
    assert in_use(session) == 3 * KIB + 64


def test_past_the_quota_only_what_takes_more_room_fails_until_something_is_freed(session: Session) -> None:
    net = session.module(square)
    weight, data = net.named_parameters()["weight"], session.ones(1, 16)
    optimizer = session.optimizer("adam", [weight], lr=0.1)
    net(data).sum().backward()
    optimizer.step()
    assert "QuotaError" in str(caught(session.synchronize))
    before = weight.detach()
    assert torch.equal(before.fetch(), net.state_dict()["weight"])  # a view takes no room
    assert "QuotaError: 4 bytes more" in str(caught(before.sum().item))
    optimizer.zero_grad()
    assert in_use(session) == 3 * KIB + 64 + 4
    assert "QuotaError" in str(caught(lambda: (data + 1).fetch()))
    optimizer.free()
    assert in_use(session) == KIB + 64
    assert (data + 1).sum().item() == 32
    net(data).sum().backward()
    assert weight.grad.sum().item() == 256


def test_gradients_that_are_dropped_or_replaced_count_no_more(session: Session) -> None:
    weight = session.tensor(torch.ones(16, 16), requires_grad=True)
    drops: list[Callable[[], Any]] = [
        lambda: setattr(weight, "grad", None),
        lambda: session.run(lambda held: setattr(held, "grad", None), weight),
    ]
    for drop in drops:
        for _ in range(3):
            weight.sum().backward()
            assert in_use(session) == 2 * KIB
        session.run(lambda held: setattr(held, "grad", held.grad.clone()), weight)
        assert in_use(session) == 2 * KIB
        drop()
        assert in_use(session) == KIB
    weight.sum().backward()
    weight.free()
    assert in_use(session) == 0


def test_a_tensor_that_requires_grad_later_is_counted_with_its_gradient(session: Session) -> None:
    for require in (
        lambda tensor: tensor.requires_grad_(),
        lambda tensor: setattr(tensor, "requires_grad", True),
        lambda tensor: tensor.set_(session.run(lambda: torch.ones(256))).requires_grad_(True),
    ):
        tensor = session.ones(256)
        require(tensor)
        tensor.sum().backward()
        assert in_use(session) == 2 * KIB
        del tensor
        assert in_use(session) == 0


def test_a_gradient_that_is_held_elsewhere_counts_once(session: Session) -> None:
    net = session.module(square)
    weight = net.named_parameters()["weight"]
    net(session.ones(1, 16)).sum().backward()
    gradient = weight.grad
    assert in_use(session) == 2 * KIB
    net.free()
    del net
    assert in_use(session) == 2 * KIB
    weight.free()
    assert in_use(session) == KIB
    assert gradient.sum().item() == 256
    gradient.free()
    assert in_use(session) == 0


class Growing(nn.Module):
    """Comes to hold two weights more when it is told to, or on its first call."""

    def grow(self) -> None:
        self.register_buffer("held", torch.ones(2 * 256))

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "held"):
            self.grow()
        return x + 1


def keep_in_context(session: Session) -> Any:
    context = session.context()
    context.save_tensor(session.run(square).named_parameters()["weight"])
    return context


def keep_in_attribute(session: Session) -> Any:
    module = session.module(nn.Identity)
    module.set("weight", session.run(lambda: nn.Parameter(torch.ones(256))))
    return module


def keep_in_state(session: Session) -> Any:
    optimizer = session.optimizer("sgd", [session.tensor([], requires_grad=True)], lr=0.1, momentum=0.9)
    state = optimizer.state_dict()
    optimizer.load_state_dict(state | {"state": {0: {"momentum_buffer": torch.ones(256)}}})
    return optimizer


def keep_as_data(session: Session) -> Any:
    tensor = session.ones(2)
    tensor.data = session.ones(256)
    return tensor


def keep_by_growth(session: Session) -> Any:
    tensor = session.ones(1)
    tensor.resize_(256)
    return tensor


@pytest.mark.parametrize(
    "keep",
    [keep_in_context, keep_in_attribute, keep_in_state, keep_as_data, keep_by_growth],
)
def test_what_an_object_keeps_counts_until_the_object_is_freed(session: Session, keep: Callable[..., Any]) -> None:
    for _ in range(3):
        kept = keep(session)
        assert in_use(session) == KIB
        del kept
        assert in_use(session) == 0


@pytest.mark.parametrize(
    "grow",
    [
        lambda module, session: module.call("grow").fetch(),
        lambda module, session: module(session.ones(1)).fetch(),
        lambda module, session: session.run(lambda held: held.grow(), module),
        lambda module, session: session.run(grow_and_fail, module),
    ],
)
def test_an_object_that_outgrows_the_quota_is_an_error_of_the_call(
    session: Session, grow: Callable[[Any, Session], Any]
) -> None:
    weight, module = session.ones(256), session.module(Growing)
    error = caught(lambda: grow(module, session))
    assert ("ValueError: after that" if "after that" in str(error) else "QuotaError: 2,048 bytes more") in str(error)
    assert in_use(session) == 3 * KIB
    assert "QuotaError: 4 bytes more" in str(caught(lambda: session.ones(1).fetch()))
    module.free()
    assert (weight + 1).sum().item() == 512


def grow_and_fail(held: Growing) -> None:
    held.grow()
    raise ValueError("after that")


def test_a_tensor_that_outgrows_the_quota_in_place_is_poisoned_and_freed(session: Session) -> None:
    tensor = session.ones(256)
    tensor.resize_(1024)
    assert "QuotaError: 3,072 bytes more" in str(caught(tensor.fetch))
    assert in_use(session) == 0


def test_frozen_parameters_that_are_cast_count_as_what_they_are(session: Session) -> None:
    net = session.module(nn.Linear, 10, 10)
    net.call("requires_grad_", False)
    handles = list(net.parameters())
    net.call("to", torch.float64)
    session.synchronize()
    assert len(handles) == 2
    assert in_use(session) == 110 * 8


def test_a_gradient_that_is_retained_counts(session: Session) -> None:
    leaf = session.tensor(torch.ones(1), requires_grad=True)
    inner = leaf * torch.ones(256)
    inner.retain_grad()
    (inner * 2).sum().backward()
    assert in_use(session) == 2 * KIB + 4 + 4  # with both gradients


def test_training_within_the_quota_is_the_same_as_without_it() -> None:
    def losses(max_bytes: int | None) -> list[float]:
        with local_session(1, max_bytes) as session:
            session.manual_seed(3)
            net, data = session.module(nn.Linear, 16, 16), session.randn(8, 16)
            optimizer = session.optimizer("adam", net.parameters(), lr=0.01)
            found = []
            for _ in range(5):
                optimizer.zero_grad()
                loss = F.mse_loss(net(data), data)
                loss.backward()
                optimizer.step()
                found.append(loss.item())
                del loss
            if max_bytes:
                assert in_use(session) < max_bytes
            return found

    assert losses(8 * KIB) == losses(None)


def test_without_a_quota_nothing_is_counted() -> None:
    with local_session(1) as session:
        net = session.module(Growing)
        net.call("grow")
        (registry,) = registries(session)
        assert not registry.is_limited
        assert session.stats()[0]["module"]["bytes"] == {"cpu": 2 * KIB}
