"""Ctrl-C, forked processes and threads: what is recorded goes out whole or not at all, errors to whom they concern."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from in_process import InProcess, local_session, registries

from raytorch.errors import RemoteOpError, SessionLostError
from raytorch.session import instruction_stream, interrupts
from raytorch.session.session import Session

TIMEOUT_S = 30.0


@pytest.fixture
def session() -> Iterator[Session]:
    with local_session(2) as session:
        yield session


def caught(use: Callable[[], Any]) -> RemoteOpError:
    with pytest.raises(RemoteOpError) as info:
        use()
    return info.value


# -- Ctrl-C ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", ["a question", "a flush", "an upload"])
def test_an_interrupt_in_the_midst_of_a_send_comes_after_it(
    session: Session, monkeypatch: pytest.MonkeyPatch, rank: int, name: str
) -> None:
    counter, added = session.zeros(1), 0
    sends: dict[str, Callable[[], Any]] = {
        "a question": counter.item,
        "a flush": session.synchronize,
        "an upload": lambda: session.tensor(torch.ones(1 << 20)),
    }

    def add_and_send() -> None:
        nonlocal added
        while True:  # until it is this thread that sends, rather than the stream's own
            counter.add_(1)
            added += 1
            sends[name]()

    with monkeypatch.context() as patch:
        interrupt_once(patch, rank)
        with pytest.raises(KeyboardInterrupt):
            add_and_send()
    assert counter.item(all=True) == [added, added]
    session.synchronize()
    assert [len(registry) for registry in registries(session)] == [1, 1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def interrupt_once(patch: pytest.MonkeyPatch, rank: int) -> None:
    """Let Ctrl-C come when the main thread sends to that rank."""
    send, execute, senders, interrupted = InProcess.send, InProcess._execute, [], []

    def sending(self: InProcess, *args: Any) -> Any:
        senders.append(threading.current_thread())
        return send(self, *args)

    def interrupting(self: InProcess, place: int, *args: Any) -> bytes:
        if place == rank and senders[-1] is threading.main_thread() and not interrupted:
            interrupted.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        return execute(self, place, *args)

    patch.setattr(InProcess, "send", sending)
    patch.setattr(InProcess, "_execute", interrupting)


def test_interrupts_at_any_time_leave_what_is_recorded_whole(session: Session) -> None:
    counter, recorded = session.zeros(1), 0

    def step() -> None:
        nonlocal recorded
        counter.add_(1)
        recorded += 1
        (counter + session.tensor([1.0])).item()

    interrupted = interrupted_again_and_again(step)
    first, second = counter.item(all=True)
    assert first == second
    assert recorded <= first <= recorded + interrupted
    session.synchronize()
    assert [len(registry) for registry in registries(session)] == [1, 1]


def interrupted_again_and_again(step: Callable[[], None], times: int = 100) -> int:
    """Take steps until they were interrupted so often, each time at another moment."""
    can_be_caught = is_over = False  # plain values: an Event may stay locked when it is interrupted

    def wait_until_it_can_be_caught() -> None:
        while not can_be_caught:
            time.sleep(1e-4)

    def interrupt() -> None:
        nonlocal can_be_caught, is_over
        for number in range(times):
            wait_until_it_can_be_caught()
            can_be_caught = False
            time.sleep(number * 5e-5)
            os.kill(os.getpid(), signal.SIGINT)
        wait_until_it_can_be_caught()
        is_over = True

    thread, caught = threading.Thread(target=interrupt), 0
    thread.start()
    while not is_over:
        try:
            can_be_caught = True
            while not is_over:
                step()
        except KeyboardInterrupt:
            caught += 1
    thread.join()
    assert caught == times
    return caught


def test_an_interrupt_at_any_line_leaves_what_is_recorded_whole(session: Session, monkeypatch: Any) -> None:
    monkeypatch.setattr(instruction_stream, "BUSY_S", 0.0)
    counter, recorded = session.zeros(1), 0

    def step() -> None:
        nonlocal recorded
        while not session._recorder.stream._dozing:  # so that its own thread is to be woken
            time.sleep(1e-4)
        counter.add_(1)
        recorded += 1

    lines = 0
    while interrupted_at(lines, step):
        lines += 1
    assert lines > 20
    assert recorded <= counter.item() <= recorded + lines


def interrupted_at(number: int, step: Callable[[], None]) -> bool:
    """Take a step in which Ctrl-C comes when so many lines of raytorch's and Python's were done; whether it came."""
    line = 0

    def tracing(frame: Any, event: str, argument: Any) -> Any:
        nonlocal line
        if event == "line" and frame.f_code.co_filename != __file__:
            line += 1
            if line > number:
                sys.settrace(None)
                signal.raise_signal(signal.SIGINT)
        return tracing

    try:
        sys.settrace(tracing)
        step()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def test_a_second_interrupt_ends_a_send_that_does_not_end(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    counter, send = session.zeros(1), session._transport.send

    def never(*args: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():  # the stream's own: it takes no Ctrl-C
            return send(*args)
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        raise AssertionError("not to be reached")

    monkeypatch.setattr(interrupts, "PATIENCE_S", 0.0)
    monkeypatch.setattr(session._transport, "send", never)

    def ask_until_this_thread_sends() -> None:
        while True:
            counter.item()

    with pytest.raises(KeyboardInterrupt):
        ask_until_this_thread_sends()
    with pytest.raises(SessionLostError, match="interrupted while it was sent"):
        counter.item()


# -- forked processes --------------------------------------------------------------------------------------------------

USES: dict[str, Callable[[Session, Any], Any]] = {
    "a result": lambda session, handle: handle.item(),
    "a call": lambda session, handle: handle + 1,
    "an upload": lambda session, handle: session.tensor([1.0]),
    "a function": lambda session, handle: session.run(len, handle),
    "synchronize": lambda session, handle: session.synchronize(),
}


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_is_refused_at_once_and_leaves_the_session_alone(session: Session) -> None:
    handle = session.zeros(2)
    handle.add_(1)
    child = os.fork()
    if not child:
        status = 1
        try:
            for use in USES.values():
                with pytest.raises(SessionLostError, match="forked"):
                    use(session, handle)
            handle.free()
            session.close()
            status = 0
        finally:
            os._exit(status)
    deadline = time.monotonic() + TIMEOUT_S
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    assert os.waitstatus_to_exitcode(ended[1]) == 0
    assert handle.tolist() == [1, 1]


# -- threads -----------------------------------------------------------------------------------------------------------


def test_an_error_is_told_to_the_thread_that_recorded_what_failed(session: Session) -> None:
    one, good = session.rank(1), session.ones(2)
    with ThreadPoolExecutor(1) as other, ThreadPoolExecutor(1) as third:
        other.submit(lambda: [one.ones(2) @ one.ones(3), None][1]).result()
        session.ones(2).view(7)
        assert third.submit(good.tolist).result() == [1, 1]
        assert third.submit(session.synchronize).result() is None
        assert caught(good.tolist).operation == "torch.Tensor.view"
        assert good.tolist() == [1, 1]
        session.synchronize()
        error = caught(lambda: other.submit(good.tolist).result())
        assert (error.operation, error.rank, error.file) == ("torch.Tensor.__matmul__", 1, __file__)
        assert other.submit(good.tolist).result() == [1, 1]


def test_an_error_of_a_thread_that_has_ended_is_told_to_whoever_asks_next(session: Session) -> None:
    good = session.ones(2)
    thread = threading.Thread(target=lambda: [good.view(7), None][1])
    thread.start()
    thread.join()
    assert caught(good.tolist).operation == "torch.Tensor.view"
    assert good.tolist() == [1, 1]


def test_leaving_a_session_tells_of_what_other_threads_recorded_too() -> None:
    session = local_session(2)
    good = session.ones(2)
    with ThreadPoolExecutor(1) as other:
        other.submit(lambda: [good.view(7), None][1]).result()
        assert good.tolist() == [1, 1]
        assert "view" in caught(session.close).operation
