"""However many calls of ever other structure a client makes, neither it nor the workers remember them all."""

import contextlib
import gc
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from in_process import local_session, registries
from torch import nn

from raytorch.session import arguments, instruction_stream
from raytorch.session.program import MOST_PATTERNS, Program
from raytorch.session.session import Session

FEW = 20
"""Patterns that are remembered, where a test does not need many calls."""


@pytest.fixture
def session() -> Iterator[Session]:
    with local_session(2) as session:
        yield session


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (arguments, instruction_stream):
        monkeypatch.setattr(module, "MOST_PATTERNS", FEW)


def known_to_workers(session: Session) -> list[int]:
    """How many patterns each worker knows."""
    session.synchronize()
    transport: Any = session._transport
    return [len(interpreter._clients[0].calls) for interpreter in transport.interpreters]


def known_to_client(session: Session) -> int:
    """How many entries the largest of the client's memories has."""
    recorder = session._recorder
    return max(len(recorder._patterns), len(recorder._expected), len(recorder._plans))


class Shelf(nn.Module):
    """Keeps what it is told, and gives a tensor or a value, as the name has it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def put(self, name: str) -> None:
        self.names.add(name)

    def echo(self, name: str) -> Any:
        return torch.ones(len(name)) if name.startswith("tensor") else name


# -- what is no pattern of its own -------------------------------------------------------------------------------------


def test_calls_with_ever_other_words_share_their_patterns(session: Session) -> None:
    context, tensor = session.context(), session.ones(1)

    def call(number: int) -> None:
        name = f"name-{number}"
        assert session.run(str.upper, name) == name.upper()
        assert session.run(lambda tree: sorted(tree), {name: tensor, "a": 1}) == ["a", name]
        assert session.run(lambda tree: tree, {name: [number] * number, "b": {name: None}}) == {
            name: [number] * number,
            "b": {name: None},
        }
        assert session.run(lambda *tree: tree, (name, (None, True)), [], {}) == ((name, (None, True)), [], {})
        context.save_value(name, {"x": number})

    call(1)
    known = known_to_workers(session)
    for number in range(2, 200):
        call(number)
    assert known_to_workers(session) == known
    assert known_to_client(session) <= max(known)
    assert [context.value(f"name-{number}") for number in (1, 100)] == [{"x": 1}, {"x": 100}]


def test_what_waits_to_be_sent_is_as_it_was_when_it_was_recorded(session: Session) -> None:
    context, numbers, options = session.context(), [1, [2]], {"a": [1]}
    context.save_value("numbers", numbers)
    context.save_value("options", options)
    numbers.append(3)
    numbers[1].append(3)  # type: ignore[attr-defined]
    options["a"].append(3)
    assert context.value("numbers") == [1, [2]]
    assert context.value("options") == {"a": [1]}


def test_a_long_text_is_part_of_no_pattern(session: Session) -> None:
    shelf = session.module(Shelf)
    for number in range(5):
        text = f"{number}" * 100_000
        assert shelf.call("echo", text) == text
    assert len(session._recorder._patterns) < 5
    assert "0" * 1000 not in str(list(session._recorder._patterns))


def test_the_kind_of_result_is_learned_for_each_word(session: Session) -> None:
    shelf = session.module(Shelf)
    for _ in range(3):
        for name in ("text", "tensor", "other"):
            given = shelf.call("echo", name)
            assert given.tolist() == [1] * 6 if name == "tensor" else given == name


# -- what is forgotten -------------------------------------------------------------------------------------------------


class Keys(nn.Module):
    """Gives the types of a dictionary's keys."""

    def forward(self, values: dict[Any, Any]) -> list[str]:
        return [type(key).__name__ for key in values]


def test_keys_that_are_equal_but_of_other_types_stay_apart(session: Session) -> None:
    types_of, x = session.module(Keys), session.ones(1)
    assert [types_of({key: x}) for key in (1, True, 1.0)] == [["int"], ["bool"], ["float"]]


def test_fifty_thousand_calls_with_other_words_are_forgotten_and_right() -> None:
    learned = MOST_PATTERNS + 2000
    with local_session(1) as session, torch.no_grad():
        context, shelf, total = session.context(), session.module(Shelf), session.zeros(1)
        for number in range(50_000):
            context.save_value(f"name-{number}", number)
            total = total + 1
        assert max(*known_to_workers(session), known_to_client(session)) < 20
        for number in range(learned):
            shelf.call("put", f"name-{number}")
            total = total + 1
        assert session.run(lambda held: len(held.names), shelf) == learned
        assert [context.value(f"name-{number}") for number in (0, 49_999)] == [0, 49_999]
        assert total.item() == 50_000 + learned
        assert max(*known_to_workers(session), known_to_client(session), len(shelf._expected)) <= MOST_PATTERNS


@pytest.mark.usefixtures("forgetful")
def test_what_was_forgotten_is_learned_again(session: Session) -> None:
    shelf, total, array = session.module(Shelf), session.zeros(1), session.tensor([[1.0, 3.0], [5.0, 2.0]])
    for number in range(10 * FEW):
        assert shelf.call("echo", f"tensor-{number}").sum().item() == len(f"tensor-{number}")
        total += array.max(1).values[1]
        total = total + torch.sum(array, dim=[number % 2])[0] * 0
    assert total.item() == 5 * 10 * FEW
    assert all(known < 2 * FEW for known in known_to_workers(session))
    assert known_to_client(session) <= FEW
    assert len(shelf._expected) <= FEW


@pytest.mark.usefixtures("forgetful")
def test_what_could_not_be_sent_does_not_keep_workers_from_forgetting(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = session._transport.send
    refused: list[bool] = []

    def refuse_every_second(packed: bytes, attachments: Any) -> Any:
        if Program.unpack(packed).forgets:
            refused.append(len(refused) % 2 == 0)
            if refused[-1]:
                raise MemoryError("the object store is full")
        return send(packed, attachments)

    shelf, total = session.module(Shelf), session.zeros(1)
    with monkeypatch.context() as patch:
        patch.setattr(session._transport, "send", refuse_every_second)
        for number in range(10 * FEW):
            total.add_(1)
            with contextlib.suppress(MemoryError):
                shelf.call("put", f"name-{number}")
    assert total.item() == session.run(lambda held: len(held.names), shelf) == 10 * FEW
    assert sum(refused) > 3
    assert all(known < 2 * FEW for known in known_to_workers(session))


@pytest.mark.usefixtures("forgetful")
def test_threads_that_record_while_others_make_all_be_forgotten_are_right(session: Session) -> None:
    together = threading.Barrier(4)

    def work(thread: int) -> float:
        together.wait()
        with torch.no_grad():
            total = session.zeros(1)
            for number in range(200):
                total = total + thread
                total.add_(torch.ones(1) * 0 if number % 50 == 0 else 0)
                total = torch.add(total, 1, alpha=number % 3) - number % 3
                torch.cat([total] * (number % 40 + 1))
        return float(total.item())

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(work, range(4))) == [200.0 * thread for thread in range(4)]
    finally:
        sys.setswitchinterval(interval)


def test_what_an_object_gives_is_forgotten_with_it(session: Session) -> None:
    tensor = session.ones(2)
    for _ in range(50):
        assert session.module(nn.Identity)(tensor).tolist() == [1, 1]
    gc.collect()
    session.synchronize()
    assert [len(registry) for registry in registries(session)] == [1, 1]
    known = sum(type(held) is arguments.BoundedCache for held in gc.get_objects())
    for _ in range(50):
        assert session.module(nn.Identity)(tensor).tolist() == [1, 1]
    gc.collect()
    assert sum(type(held) is arguments.BoundedCache for held in gc.get_objects()) == known
