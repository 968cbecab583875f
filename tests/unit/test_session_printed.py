"""What workers print is shown by the client that let them do it, with the rank, once."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from in_process import local_session
from torch import Tensor, nn

from raytorch.errors import RemoteOpError
from raytorch.session import instruction_stream, worker_output
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


def test_an_error_is_noted_before_what_was_printed_is_shown(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(printed: Any) -> None:
        raise RuntimeError("not here")

    error = RemoteOpError.describing(operation="view", arguments="", rank=0, file="", line=0, reason="no")
    told: Any = SimpleNamespace(result=lambda: SimpleNamespace(printed=(), errors=[error]))
    monkeypatch.setattr(instruction_stream, "show", refuse)
    stream = session._recorder.stream
    with pytest.raises(RuntimeError, match="not here"):
        stream._hear(told)
    assert stream.untold
    stream.untold.mark_reported(error)
