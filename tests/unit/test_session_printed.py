"""What workers print is shown by the client that let them do it, with the rank, once."""

import io
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process import InProcess, local_session
from torch import Tensor, nn

from raytorch.errors import RemoteOpError
from raytorch.session import instruction_stream, worker_output
from raytorch.session.instruction_stream import Future
from raytorch.session.program import Report
from raytorch.session.remote_tensor import RemoteTensor
from raytorch.session.session import Session


@pytest.fixture
def session() -> Iterator[Session]:
    with local_session(workers=2) as session:
        yield session


def greet(name: str) -> int:
    print("hello", name)
    print("and\nagain", end="")
    print("look out", file=sys.stderr)
    return 7


def test_a_function_that_is_run(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    assert session.run(greet, "you") == 7
    session.synchronize()
    shown = capsys.readouterr()
    assert sorted(shown.out.splitlines()) == sorted(
        f"(rank {rank}) {line}" for rank in (0, 1) for line in ("hello you", "and", "again")
    )
    assert shown.out.index("(rank 0) hello you") < shown.out.index("(rank 0) and") < shown.out.index("(rank 0) again")
    assert sorted(shown.err.splitlines()) == ["(rank 0) look out", "(rank 1) look out"]
    session.synchronize()
    assert capsys.readouterr() == ("", "")


def test_a_function_on_one_rank(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    session.rank(1).run(print, "here")
    session.synchronize()
    assert capsys.readouterr().out == "(rank 1) here\n"


class Talking(nn.Module):
    """Prints in its forward."""

    def forward(self, x: Tensor) -> Tensor:
        print("forward", tuple(x.shape))
        return x * 2


def talk(context: Any, grad: Tensor) -> Tensor:
    print("backward", grad.item())
    return grad


def test_what_runs_when_it_is_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    with local_session() as session:
        net, x = session.module(Talking), session.ones(1, requires_grad=True)
        function = session.function(lambda context, x: x.clone(), talk)
        handle = x.register_hook(lambda grad: print("hook", grad.item()))
        function.apply(net(x)).sum().backward()
        session.synchronize()
        assert capsys.readouterr().out.splitlines() == [
            "(rank 0) forward (1,)",
            "(rank 0) backward 1.0",
            "(rank 0) hook 2.0",
        ]
        assert handle


def failing() -> None:
    print("so far")
    raise ValueError("no further")


def test_what_was_printed_before_an_error(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RemoteOpError, match="no further"):
        session.rank(1).run(failing)
    assert capsys.readouterr().out == "(rank 1) so far\n"
    assert session.ones(1).item() == 1


def test_what_is_printed_cannot_command_the_terminal(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    session.rank(0).run(print, "\x1b]0;title\x07 \x1b[2J")
    assert capsys.readouterr().out == "(rank 0) \\x1b]0;title\\x07 \\x1b[2J\n"


def flood() -> None:
    for _ in range(10):
        print("x" * 400)


def test_a_flood_is_cut_short(
    session: Session, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_output, "MOST_PRINTED", 1000)
    session.rank(0).run(flood)
    shown = capsys.readouterr().out
    assert len(shown) < 1200
    assert shown.endswith("(rank 0) ... and 3,010 characters more\n")
    session.rank(0).run(print, "afterwards")
    assert capsys.readouterr().out == "(rank 0) afterwards\n"


def test_nobody_needs_to_see_it(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    with Path(__file__).open(encoding="utf-8") as closed:
        pass
    monkeypatch.setattr(sys, "stdout", closed)
    session.rank(0).run(torch.manual_seed, 3)
    session.rank(0).run(print, "unseen")


class Refusing(io.StringIO):
    """A stream that takes nothing."""

    def write(self, text: str) -> int:
        raise RuntimeError("not here")


@pytest.mark.parametrize("stream", [None, Refusing()])
def test_a_client_that_can_show_nothing_is_told_of_errors_all_the_same(
    session: Session, monkeypatch: pytest.MonkeyPatch, stream: Any
) -> None:
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    with pytest.raises(RemoteOpError, match="no further"):
        session.rank(1).run(failing)
    session.module(Talking)(session.ones(2)).view(7)
    with pytest.raises(RemoteOpError, match="view"):
        session.synchronize()
    assert session.ones(1).item() == 1


def printing_in_backward(session: Session) -> RemoteTensor:
    """A loss whose ``backward()`` prints a line, and is recorded without waiting for it."""
    x = session.ones(1, requires_grad=True)
    loss = (x * 2).sum()
    x.sum().backward()  # the first of its kind is waited for
    x.register_hook(lambda grad: print("hook", grad.item()))
    session.synchronize()
    return loss


def test_text_that_cannot_be_shown_hides_no_error(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(printed: Any) -> None:
        raise RuntimeError("not here")

    total = printing_in_backward(session)
    with monkeypatch.context() as patch:
        patch.setattr(instruction_stream, "show", refuse)
        total.backward()
        total.backward()
        with suppress(RuntimeError):  # which the stream's own thread may have met before
            session.synchronize()
    with pytest.raises(RemoteOpError, match="backward through the graph a second time"):
        session.synchronize()


class Held(InProcess):
    """Workers whose reports come when they are let go."""

    def __init__(self) -> None:
        super().__init__(1, None)
        self.waiting, self.let_go = threading.Semaphore(0), threading.Event()
        self.let_go.set()

    def hold(self) -> None:
        self.waiting = threading.Semaphore(0)
        self.let_go.clear()

    def send(self, packed: bytes, attachments: Any) -> list[Future]:
        return [HeldReport(self, future) for future in super().send(packed, attachments)]


class HeldReport:
    """A report that is there once its transport lets go."""

    def __init__(self, transport: Held, future: Future) -> None:
        self._transport, self._future = transport, future

    def done(self) -> bool:
        return self._transport.let_go.is_set()

    def result(self) -> Report:
        self._transport.waiting.release()
        assert self._transport.let_go.wait(60)
        return self._future.result()


def test_text_that_several_threads_wait_for_is_shown_once_and_before_any_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[Any] = []
    begun, may_end = threading.Event(), threading.Event()

    def show_slowly(printed: Any) -> None:
        begun.set()
        assert may_end.wait(60)
        shown.extend(printed)

    transport = Held()
    with Session(transport) as session, ThreadPoolExecutor(3) as threads:
        total = printing_in_backward(session)
        transport.hold()
        monkeypatch.setattr(instruction_stream, "show", show_slowly)
        total.backward()

        def wait() -> int:
            session.synchronize()
            return len(shown)

        numbers = [threads.submit(wait) for _ in range(3)]
        assert all(transport.waiting.acquire(timeout=60) for _ in range(3))
        transport.let_go.set()
        assert begun.wait(60)
        may_end.set()
        assert [number.result(60) for number in numbers] == [1, 1, 1]
