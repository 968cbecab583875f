"""What unit tests are held to."""

import signal
import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """Hold a test to leave the handlers of signals as they were, on which others depend."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    after = [signal.getsignal(number) for number in numbers]
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    assert after == before


@pytest.fixture(autouse=True)
def unanswered_calls() -> Iterator[None]:
    """Forget the calls of a test that no store answers: a command that ends while there are any ends its process."""
    yield
    if stores := sys.modules.get("raytorch.runs.remote_folder"):
        stores._under_way.clear()
