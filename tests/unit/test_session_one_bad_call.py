"""One bad call is told, and the session goes on."""

import asyncio
import gc
import sys
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import ModuleType
from typing import Any

import pytest
from in_process import local_session

from raytorch.errors import RaytorchError, RemoteOpError
from raytorch.session.session import Session


@pytest.fixture
def session() -> Iterator[Session]:
    with local_session(2) as session:
        yield session


class Mute(Exception):  # noqa: N818
    def __str__(self) -> str:
        raise RuntimeError("no words")

    __repr__ = __str__


class Worse(BaseException):
    def __str__(self) -> str:
        raise KeyboardInterrupt


def raising(error: BaseException) -> Any:
    raise error


def in_a_cause() -> None:
    try:
        raising(Mute())
    except Mute as error:
        raise LookupError("above") from error


RAISED: dict[str, tuple[Callable[[], Any], str]] = {
    "a message that raises": (lambda: raising(Mute()), "Mute"),
    "a message that interrupts": (lambda: raising(Worse()), "Worse"),
    "a mute cause": (in_a_cause, "LookupError: above"),
    "CancelledError": (lambda: raising(asyncio.CancelledError()), "CancelledError"),
    "GeneratorExit": (lambda: raising(GeneratorExit()), "GeneratorExit"),
    "KeyboardInterrupt": (lambda: raising(KeyboardInterrupt()), "KeyboardInterrupt"),
    "SystemExit": (lambda: sys.exit(3), "SystemExit: 3"),
    "StopIteration": (lambda: next(iter(())), "StopIteration"),
    "a group": (lambda: raising(BaseExceptionGroup("several", [KeyboardInterrupt()])), "several"),
    "too deep": (lambda: (deep := lambda: deep())(), "RecursionError"),
    "text that is no UTF-8": (lambda: raising(ValueError("\ud800")), "ValueError"),
}


@pytest.mark.parametrize("name", RAISED)
def test_whatever_a_function_raises_is_its_own_error(session: Session, name: str) -> None:
    function, message = RAISED[name]
    for _ in range(2):
        with pytest.raises(RemoteOpError, match=message):
            session.run(function)
        assert session.ones(2).sum().item() == 2


class Unpicklable:
    def __reduce__(self) -> Any:
        raise TypeError("not to be pickled")


class Words(str):
    __slots__ = ()

    def __reduce__(self) -> Any:
        raise TypeError("not to be pickled")


class Unreadable(str):
    """Can be sent, but not read where it comes to."""

    __slots__ = ()

    def __reduce__(self) -> Any:
        return raising, (LookupError("not to be read"),)


RESULTS: dict[str, Callable[[], Any]] = {
    "a word": lambda: Words("a"),
    "in a list": lambda: [1, Words("a")],
    "in a dictionary": lambda: {"a": {"b": Words("a")}},
    "a key": lambda: {Unpicklable(): 1},
    "an array of objects": lambda: __import__("numpy").array([threading.Lock()], dtype=object),
    "unreadable": lambda: Unreadable("a"),
    "an unreadable part": lambda: [1, Unreadable("a")],
}


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_that_cannot_be_sent_or_read_is_told(session: Session, name: str) -> None:
    for _ in range(2):
        with pytest.raises(RemoteOpError, match=r"not to be|cannot pickle"):
            session.run(RESULTS[name])
        assert session.ones(2).sum().item() == 2
    method = session.object(lambda: RESULTS[name])
    with pytest.raises(RemoteOpError, match=r"not to be|cannot pickle"):
        method().fetch()
    del method
    gc.collect()  # the error that was not to be read keeps its own frame
    assert session.handles() == []


def test_an_argument_that_cannot_be_sent_is_refused_before_it_is_recorded(session: Session) -> None:
    lock = threading.Lock()
    for argument in (Unpicklable(), [lock], lambda: lock):
        with pytest.raises(TypeError, match=r"not to be pickled|cannot pickle"):
            session.run(str, argument)
    assert session.ones(2).sum().item() == 2


def test_a_type_that_only_one_side_knows_is_told(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("only_here")
    module.Pair = namedtuple("Pair", "left right", module="only_here")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "only_here", module)
    pair, ones = module.Pair, session.ones(2)
    is_known = threading.Event()
    execute = type(session._transport)._execute

    def without_the_module(self: Any, *args: Any) -> Any:
        if is_known.is_set():
            return execute(self, *args)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "only_here", None)
            return execute(self, *args)

    monkeypatch.setattr(type(session._transport), "_execute", without_the_module)
    with pytest.raises(RemoteOpError, match="only_here"):
        session.run(len, pair(ones, 1))
    is_known.set()
    assert session.run(len, pair(ones, 1)) == 2
    assert session.ones(2).sum().item() == 2


def test_a_type_that_cannot_be_pickled_is_refused_and_nothing_is_kept(session: Session) -> None:
    class Meta(type):
        def __reduce__(cls) -> Any:
            raise TypeError("not to be pickled")

    class Odd(tuple, metaclass=Meta):  # type: ignore[type-arg]
        pass

    ones = session.ones(2)
    with suppress(TypeError, RaytorchError):
        session.run(len, Odd((ones, ones)))
    assert session.ones(2).sum().item() == 2
