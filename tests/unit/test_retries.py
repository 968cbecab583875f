"""Calls of a store that fails, with a clock of the test's own."""

import logging
from collections.abc import Callable, Iterator

import pytest

from raytorch.errors import StorageError
from raytorch.sources import retries
from raytorch.sources.retries import retrying

PLACE = "s3://AKIAKEY:SECRETWORD@bucket/x"


class Clock:
    """What stands for the module ``time`` in retries.py alone: threads of other tests sleep too."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(retries, "time", clock)
    return clock


def failing(times: int, error: Exception) -> Callable[[], str]:
    left = [error] * times

    def call() -> str:
        if left:
            raise left.pop()
        return "answer"

    return call


@pytest.mark.parametrize(
    "error",
    [
        OSError("AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 7, Could not connect to server"),
        OSError("AWS Error SLOW_DOWN during ListObjectsV2 operation: Please reduce your request rate."),
        OSError("AWS Error UNKNOWN (HTTP status 503) during HeadObject operation: No response body."),
        ConnectionResetError("Connection reset by peer"),
        TimeoutError(),
        StorageError("s3://bucket did not answer within 15 s"),
    ],
)
def test_what_may_pass_is_tried_again_with_longer_and_longer_pauses(error: Exception, clock: Clock) -> None:
    assert retrying(PLACE, failing(12, error)) == "answer"
    longest = [0.5, 1, 2, 4, 8, 16, *[20] * 6]
    assert all(most / 2 <= slept <= most for slept, most in zip(clock.pauses, longest, strict=True))
    assert len(set(clock.pauses)) == 12  # at random


def test_the_first_failure_and_the_end_of_them_are_told(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "raytorch"):
        retrying(PLACE, failing(3, OSError("no\x1b[2J route")))
    assert caplog.messages == [
        "s3://***@bucket/x: no\\x1b[2J route; it is tried again for up to 600 s",
        "s3://***@bucket/x: the store answers, after 3 tries in vain",
    ]


def test_one_that_goes_on_failing_is_told_with_what_was_tried(clock: Clock) -> None:
    with pytest.raises(StorageError) as caught:
        retrying(PLACE, failing(1000, OSError("no route")))
    assert str(caught.value) == (
        f"s3://***@bucket/x: the store has failed {len(clock.pauses) + 1} times in a row, for {clock.now:.0f} s; the "
        "last time: no route"
    )
    assert 600 <= clock.now < 620


@pytest.mark.parametrize(
    "error",
    [
        OSError("AWS Error ACCESS_DENIED during HeadObject operation: No response body."),
        OSError("AWS Error NO_SUCH_BUCKET during ListObjectsV2 operation: The specified bucket does not exist"),
        OSError("AWS Error UNKNOWN (HTTP status 403) during HeadObject operation"),
        OSError("google::cloud::Status(PERMISSION_DENIED: ...)"),
        OSError("Unable to load libjvm: ..."),
        PermissionError(13, "Permission denied"),
    ],
)
def test_what_is_refused_is_told_at_once(error: Exception, clock: Clock) -> None:
    with pytest.raises(StorageError, match=r"^s3://\*\*\*@bucket/x: the store refuses: .*; check your access to it$"):
        retrying(PLACE, failing(1, error))
    assert clock.pauses == []


def test_what_is_not_there_is_not_tried_again(clock: Clock) -> None:
    with pytest.raises(FileNotFoundError):
        retrying(PLACE, failing(1, FileNotFoundError()))
    assert clock.pauses == []


def test_a_server_that_speaks_http_is_told_at_once(clock: Clock) -> None:
    error = OSError("AWS Error NETWORK_CONNECTION: curlCode: 35, SSL connect error; SSL routines::wrong version number")
    with pytest.raises(StorageError, match=r"x: the store speaks http, not https: .*; add scheme=http to its address"):
        retrying(PLACE, failing(1, error))
    assert not clock.pauses
