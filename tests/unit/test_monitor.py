"""What the workers tell the driver of a run."""

import pickle
from typing import Any

import pytest
import ray

from raytorch.errors import DataError, DivergedError
from raytorch.monitor import Failure, RunMonitor, telling_failures


def failure(rank: int, *, at: float, final: bool) -> Failure:
    return Failure(
        rank, "ValueError", "what happened", "Traceback", final=final, expected=False, user_error=False, time=at
    )


def test_a_new_monitor_knows_nothing() -> None:
    status = RunMonitor().status()
    assert (status.progress, status.evaluations, status.outcome) == (None, [], None)
    assert (status.pids, status.failures, status.cause) == ({}, [], None)
    assert (status.attempts, status.begun_at, status.stopping) == (0, None, False)


def test_news_are_kept_in_the_order_of_their_coming() -> None:
    monitor = RunMonitor()
    monitor.joined(0, 11)
    monitor.joined(1, 12)
    monitor.begin_attempt()
    assert monitor.progress({"step": 1}) is False
    assert monitor.progress({"step": 2}) is False
    monitor.evaluated({"accuracy": 0.5})
    monitor.evaluated({"accuracy": 0.6})
    status = monitor.status()
    assert status.progress == {"step": 2}
    assert status.evaluations == [{"accuracy": 0.5}, {"accuracy": 0.6}]
    assert status.pids == {0: 11, 1: 12}
    assert pickle.loads(pickle.dumps(status)) == status


def test_workers_hear_that_they_should_stop_with_their_next_progress() -> None:
    monitor = RunMonitor()
    monitor.request_stop()
    assert monitor.status().stopping
    assert monitor.progress({"step": 3}) is True


def test_the_cause_is_the_first_final_failure_however_late_it_arrives() -> None:
    monitor = RunMonitor()
    monitor.failed(failure(2, at=30, final=True))
    monitor.failed(failure(0, at=10, final=False))
    assert monitor.status().cause == failure(2, at=30, final=True)
    monitor.failed(failure(1, at=20, final=True))
    status = monitor.status()
    assert status.cause == failure(1, at=20, final=True)


def test_the_cause_is_the_first_lost_peer_where_nothing_is_final() -> None:
    monitor = RunMonitor()
    monitor.failed(failure(1, at=20, final=False))
    monitor.failed(failure(0, at=10, final=False))
    assert monitor.status().cause == failure(0, at=10, final=False)


def test_a_restart_gets_over_lost_peers_and_keeps_when_the_run_began() -> None:
    monitor = RunMonitor()
    monitor.begin_attempt()
    begun_at = monitor.status().begun_at
    assert begun_at is not None
    monitor.failed(failure(0, at=10, final=False))
    monitor.begin_attempt()
    status = monitor.status()
    assert (status.attempts, status.begun_at, status.failures) == (2, begun_at, [])
    monitor.failed(failure(0, at=20, final=True))
    monitor.begin_attempt()
    assert monitor.status().cause == failure(0, at=20, final=True)


class DirectMonitor:
    """A monitor in this process, called as an actor is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monitor = RunMonitor()
        self.failed = self
        monkeypatch.setattr(ray, "get", lambda answer: answer)

    def remote(self, failure: Failure) -> None:
        self.monitor.failed(failure)


def fail(error: Exception) -> None:
    try:
        {}["the reason"]
    except KeyError as reason:
        raise error from reason


@pytest.mark.parametrize(
    ("error", "final", "expected", "user_error"),
    [
        (ZeroDivisionError("of the user's"), True, False, False),
        (ConnectionError("a peer is gone"), False, False, False),
        (DivergedError("the loss became nan"), True, True, False),
        (DataError("no such file"), True, True, True),
    ],
)
def test_a_failure_is_told_with_its_own_traceback_and_raised_further(
    monkeypatch: pytest.MonkeyPatch, error: Exception, final: bool, expected: bool, user_error: bool
) -> None:
    direct: Any = DirectMonitor(monkeypatch)
    with pytest.raises(type(error)) as raised, telling_failures(direct, 3, lambda e: isinstance(e, ConnectionError)):
        fail(error)
    assert raised.value is error
    [told] = direct.monitor.status().failures
    assert (told.rank, told.kind, told.message) == (3, type(error).__name__, str(error))
    assert (told.final, told.expected, told.user_error) == (final, expected, user_error)
    lines = told.traceback.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert "KeyError: 'the reason'" in lines
    assert "The above exception was the direct cause of the following exception:" in lines
    assert lines[-1].endswith(f"{type(error).__name__}: {error}")
    assert __file__ in told.traceback
    assert "monitor.py" not in told.traceback.replace(__file__, "")


def test_a_block_that_ends_well_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    direct: Any = DirectMonitor(monkeypatch)
    with telling_failures(direct, 0, lambda error: False):
        pass
    assert direct.monitor.status().failures == []
