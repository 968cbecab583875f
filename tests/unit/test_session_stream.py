"""What is recorded reaches the workers whole and in order, however full the buffer is and whatever a send meets."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from in_process import local_session, registries
from torch import nn

from raytorch.errors import RemoteOpError, SessionError, SessionLostError
from raytorch.session.instruction_stream import PROGRAM_LENGTH
from raytorch.session.session import Session


@pytest.fixture
def session() -> Iterator[Session]:
    with local_session(2) as session:
        yield session


def record(tensor: Any, number: int) -> None:
    for _ in range(number):
        tensor.add_(1)


@pytest.mark.parametrize("waiting", [PROGRAM_LENGTH - 2, PROGRAM_LENGTH - 1, PROGRAM_LENGTH, PROGRAM_LENGTH + 1])
def test_a_question_and_an_upload_fit_whatever_is_waiting(session: Session, waiting: int) -> None:
    counter = session.zeros(1)
    counter.item()
    record(counter, waiting)
    assert counter.item(all=True) == [waiting, waiting]
    record(counter, waiting)
    sent = session.tensor([5.0])
    record(counter, 1)
    assert sent.fetch().tolist() == [5]
    assert counter.item() == 2 * waiting + 1


def test_more_collected_handles_than_a_program_holds_are_freed(session: Session) -> None:
    tensors = [session.ones(1) for _ in range(PROGRAM_LENGTH + 500)]
    last = session.ones(1)
    session.synchronize()
    del tensors
    assert last.item() == 1
    assert [len(registry) for registry in registries(session)] == [1, 1]


def test_handles_that_are_freed_by_hand_are_sent_too(session: Session) -> None:
    tensors = [session.ones(1) for _ in range(PROGRAM_LENGTH + 500)]
    session.synchronize()
    for tensor in tensors:
        tensor.free()
    assert all(len(registry) < PROGRAM_LENGTH for registry in registries(session))


def test_a_key_that_cannot_travel_is_refused_and_nothing_is_lost(session: Session) -> None:
    tensor = session.ones(1)
    tensor.add_(1)
    with pytest.raises(SessionError, match="a dictionary's key is a RemoteTensor: use strings or numbers as keys"):
        session.run(len, {tensor: 0.1})
    assert tensor.item() == 2
    assert session.run(len, {("a", 1): tensor}) == 1


def test_what_could_not_be_sent_is_sent_later(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = session.ones(1)
    tensor.item()

    def full(packed: bytes, attachments: Any) -> Any:
        raise MemoryError("the object store is full")

    with monkeypatch.context() as patch:
        patch.setattr(session._transport, "send", full)
        tensor.add_(1)
        with pytest.raises(MemoryError, match="full"):
            tensor.item()
    assert tensor.item() == 2


def test_an_interrupted_send_ends_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    session = local_session(1)
    tensor = session.ones(1)
    tensor.item()
    send = session._transport.send

    def interrupted(packed: bytes, attachments: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        return send(packed, attachments)

    monkeypatch.setattr(session._transport, "send", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tensor.item()
    with pytest.raises(SessionLostError, match="interrupted while it was sent"):
        tensor.item()
    session.close()


def test_a_wait_that_is_interrupted_leaves_no_handle(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = session._recorder.stream
    hear = stream._hear
    with monkeypatch.context() as patch:

        def interrupted(future: Any) -> Any:
            if threading.current_thread() is threading.main_thread():
                raise KeyboardInterrupt
            return hear(future)

        patch.setattr(stream, "_hear", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.run(torch.ones, 3)
    assert stream._hear == hear
    session.synchronize()
    assert [len(registry) for registry in registries(session)] == [0, 0]


def test_what_cannot_be_described_does_not_hide_an_error(session: Session) -> None:
    net = session.module(nn.LazyLinear, 10)
    weight = net.named_parameters()["weight"]
    with pytest.raises(RemoteOpError, match="uninitialized"):
        weight.sum().item()
    assert session.ones(1).item() == 1


def test_a_function_that_exits_is_an_error(session: Session) -> None:
    with pytest.raises(RemoteOpError, match="SystemExit: 3"):
        session.run(exit_with, 3)
    assert session.ones(1).item() == 1


def exit_with(status: int) -> None:
    raise SystemExit(status)
