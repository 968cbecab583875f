"""What is left of a session that was closed: an error that says so."""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from in_process import InProcess, local_session
from torch import nn

from raytorch.errors import SessionLostError
from raytorch.session import instruction_stream
from raytorch.session.instruction_stream import Future
from raytorch.session.open_or_join import CLOSE_S, LOST_CLOSE_S, Owner
from raytorch.session.program import Report
from raytorch.session.session import Session


def test_after_it_was_closed_everything_raises_that_the_session_is_lost() -> None:
    session = local_session(2)
    tensor, module = session.ones(2), session.module(nn.Linear, 2, 2)
    optimizer = session.optimizer("sgd", module.parameters(), lr=0.1)
    (tensor + 1).sum().item()
    session.close()
    session.close()  # once more does no harm
    uses: list[Callable[[], Any]] = [
        tensor.fetch,
        tensor.item,
        lambda: tensor.shape,
        lambda: tensor + 1,
        lambda: tensor.add_(1),
        lambda: tensor.cos(),
        lambda: session.tensor([1.0]),
        lambda: session.scatter(torch.ones(2)),
        lambda: session.zeros(2),
        lambda: session.rank(0).zeros(2),
        lambda: session.manual_seed(0),
        lambda: session.run(len, [1]),
        lambda: session.get(1),
        lambda: module(tensor),
        module.state_dict,
        optimizer.step,
        session.stats,
        session.handles,
        session.barrier,
        session.synchronize,
    ]
    for use in uses:
        with pytest.raises(SessionLostError, match="connect again"):
            use()


@pytest.mark.parametrize(("lost", "patience"), [(None, CLOSE_S), (SessionLostError("its host died"), LOST_CLOSE_S)])
def test_what_workers_still_do_is_not_waited_for_when_the_session_is_lost(
    monkeypatch: pytest.MonkeyPatch, lost: SessionLostError | None, patience: float
) -> None:
    waits: list[float | None] = []

    class Busy(threading.Event):
        """Workers that end only when they are killed."""

        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout)
            return False

    killed: list[Any] = []
    monkeypatch.setattr(ray, "kill", killed.append)
    owner: Any = object.__new__(Owner)
    owner._lost, owner._actors, owner._host = lost, [], "host"
    owner._fit = SimpleNamespace(done=Busy())
    owner._end()
    assert waits == [patience, None]
    assert killed == ["host"]


def test_a_loss_that_the_transport_saw_is_told_once_and_again_to_whoever_asks() -> None:
    class Losing(InProcess):
        """Loses its workers when it is told to."""

        lost: SessionLostError | None = None

        def send(self, packed: bytes, attachments: Any) -> Any:
            if self.lost:
                raise self.lost
            return super().send(packed, attachments)

    transport = Losing(1, None)
    session = Session(transport)
    tensor = session.ones(2)
    tensor.fetch()
    transport.lost = SessionLostError("the session is lost: rank 0 is gone")
    for _ in range(2):
        with pytest.raises(SessionLostError, match="rank 0 is gone"):
            tensor.fetch()
    assert not session._recorder.stream._idle.join(5)
    session.close()  # does not tell it again


class Never(InProcess):
    """Workers that answer nothing before they are ended."""

    def __init__(self) -> None:
        super().__init__(1, None)
        self.waited_for, self.closed = threading.Event(), threading.Event()

    def send(self, packed: bytes, attachments: Any) -> list[Future]:
        return [Unanswered(self)]

    def close(self) -> None:
        self.closed.set()
        super().close()


class Unanswered:
    """A report that never comes."""

    def __init__(self, transport: Never) -> None:
        self._transport = transport

    def done(self) -> bool:
        return False

    def result(self) -> Report:
        self._transport.waited_for.set()
        self._transport.closed.wait()
        raise SessionLostError("the workers have ended")


def test_closing_ends_workers_that_the_streams_own_thread_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instruction_stream, "CLOSE_S", 0.1, raising=False)
    monkeypatch.setattr(instruction_stream, "MAX_IN_FLIGHT", 1)
    transport = Never()
    with pytest.raises(ZeroDivisionError), Session(transport) as session:  # noqa: PT012
        session.manual_seed(1)
        session._recorder.stream._send_and_hear()
        session.manual_seed(2)
        assert transport.waited_for.wait(60)  # by the stream's own thread, which makes room
        raise ZeroDivisionError
    assert transport.closed.is_set()
    assert not session._recorder.stream._idle.join(60)
    assert not session._recorder.stream._idle.is_alive()


def test_ctrl_c_while_the_stream_is_closed_leaves_no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    transport = Never()
    session = Session(transport)
    monkeypatch.setattr(session._recorder.stream._idle, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.close()
    assert transport.closed.is_set()


def test_who_waits_for_room_in_a_session_that_has_ended_waits_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instruction_stream, "MAX_IN_FLIGHT", 1)
    transport = Never()
    session = Session(transport)
    stream = session._recorder.stream
    session.manual_seed(1)
    with stream._lock:
        stream._send()
    stream._ended = SessionLostError("it has ended")
    with pytest.raises(SessionLostError, match="it has ended"):
        stream._make_room()
    transport.close()
