"""What the workers tell the driver of a run."""

import pickle
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import ray

import raytorch
from raytorch.errors import Cause, DataError, DivergedError
from raytorch.runs.status import Evaluation, WorkerFailure
from raytorch.training.monitor import DriverLink, RunMonitor, reporting_failures
from raytorch.training.stopping import DriverRequest


def failure(rank: int, *, at: float, final: bool) -> WorkerFailure:
    cause = Cause.ERROR if final else Cause.LOST_WORKER
    return WorkerFailure(
        rank, "ValueError", "what happened", "Traceback", cause, expected=False, user_error=False, time=at
    )


def test_a_new_monitor_knows_nothing() -> None:
    status = RunMonitor().status()
    assert (status.progress, status.evaluations, status.outcome) == (None, [], None)
    assert (status.pids, status.failures, status.cause) == ({}, [], None)
    assert (status.attempts, status.begun_at, status.stopping) == (0, None, False)


def test_news_are_kept_in_the_order_of_their_coming() -> None:
    monitor = RunMonitor()
    monitor.joined(0, 2, 11, "here")
    monitor.joined(1, 2, 12, "there")
    monitor.begin_attempt()
    assert monitor.progress({"step": 1}) is DriverRequest.CONTINUE
    assert monitor.progress({"step": 2}) is DriverRequest.CONTINUE
    monitor.evaluated(Evaluation(1, 0.5, {"loss": 0.5}))
    monitor.evaluated(Evaluation(2, 1.0, {"loss": 0.4}))
    status = monitor.status()
    assert status.progress == {"step": 2}
    assert [evaluation.step for evaluation in status.evaluations] == [1, 2]
    assert status.pids == {0: 11, 1: 12}
    assert status.nodes == {0: "here", 1: "there"}
    assert pickle.loads(pickle.dumps(status)) == status


def test_workers_hear_that_they_should_stop_with_their_next_progress() -> None:
    monitor = RunMonitor()
    monitor.request_stop()
    assert monitor.status().stopping
    assert monitor.progress({"step": 3}) is DriverRequest.STOP
    assert monitor.progress({"step": 4}) is DriverRequest.STOP


def test_workers_hear_once_that_they_should_save() -> None:
    monitor = RunMonitor()
    monitor.request_save()
    assert [monitor.progress({"step": step}) for step in (3, 4)] == [DriverRequest.SAVE, DriverRequest.CONTINUE]


def test_a_checkpoint_that_is_saved_answers_the_request_before_it_and_none_after() -> None:
    monitor = RunMonitor()
    monitor.saved()
    monitor.request_save()
    assert not monitor.is_saved()
    monitor.saved()
    assert monitor.is_saved()
    monitor.request_save()
    assert not monitor.is_saved()


def test_workers_that_take_over_are_not_asked_to_save_what_others_did() -> None:
    monitor = RunMonitor()
    monitor.request_save()
    monitor.saved()
    monitor.resizing()
    assert monitor.progress({"step": 3}) is DriverRequest.CONTINUE


def test_a_smaller_group_leaves_no_trace_of_nodes_that_it_is_not_on() -> None:
    monitor = RunMonitor()
    monitor.joined(1, 2, 12, "lost")
    monitor.joined(0, 2, 11, "here")
    monitor.joined(0, 1, 13, "here")
    assert monitor.status().nodes == {0: "here"}


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

    def remote(self, failure: WorkerFailure) -> None:
        self.monitor.failed(failure)


def fail(error: BaseException) -> None:
    try:
        {}["the reason"]
    except KeyError as reason:
        raise error from reason


def cause_of(error: BaseException) -> Cause:
    return Cause.LOST_WORKER if isinstance(error, ConnectionError) else Cause.ERROR


class Rank0:
    """Rank 0's link to a monitor whose answers come at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monitor = RunMonitor()
        self.progress = self
        monkeypatch.setattr(ray, "wait", lambda answers, timeout: (answers, []))
        monkeypatch.setattr(ray, "get", lambda answer: answer)
        monkeypatch.setattr("raytorch.training.monitor.PROGRESS_INTERVAL_S", 0)
        self._link = DriverLink(self, 0)

    def remote(self, update: dict[str, Any]) -> DriverRequest:
        return self.monitor.progress(update)

    def hears(self) -> DriverRequest:
        self._link.report_progress({"step": 1})
        return self._link.take_request()


def test_rank_0_takes_a_wish_to_save_once_and_one_to_stop_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    rank_0 = Rank0(monkeypatch)
    assert rank_0.hears() is DriverRequest.CONTINUE
    rank_0.monitor.request_save()
    assert [rank_0.hears(), rank_0.hears()] == [DriverRequest.SAVE, DriverRequest.CONTINUE]
    rank_0.monitor.request_save()
    rank_0.monitor.request_stop()
    assert [rank_0.hears(), rank_0.hears()] == [DriverRequest.STOP, DriverRequest.STOP]


@pytest.mark.parametrize(
    ("error", "cause", "expected", "user_error"),
    [
        (ZeroDivisionError("of the user's"), Cause.ERROR, False, False),
        (ConnectionError("a peer is gone"), Cause.LOST_WORKER, False, False),
        (DivergedError("the loss became nan"), Cause.ERROR, True, False),
        (DataError("no such file"), Cause.ERROR, True, True),
    ],
)
def test_a_failure_is_told_with_its_own_traceback_and_raised_further(
    monkeypatch: pytest.MonkeyPatch, error: Exception, cause: Cause, expected: bool, user_error: bool
) -> None:
    direct: Any = DirectMonitor(monkeypatch)
    with pytest.raises(type(error)) as raised, reporting_failures(direct, 3, cause_of):
        fail(error)
    assert raised.value is error
    [told] = direct.monitor.status().failures
    assert (told.rank, told.kind, told.message) == (3, type(error).__name__, str(error))
    assert (told.cause, told.expected, told.user_error) == (cause, expected, user_error)
    lines = told.traceback.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert "KeyError: 'the reason'" in lines
    assert "The above exception was the direct cause of the following exception:" in lines
    assert lines[-1].endswith(f"{type(error).__name__}: {error}")
    assert __file__ in told.traceback
    assert "monitor.py" not in told.traceback.replace(__file__, "")


def test_a_failure_of_several_exceptions_is_told_with_the_words_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    direct: Any = DirectMonitor(monkeypatch)
    error = ExceptionGroup("both", [KeyError("x"), ExceptionGroup("inner", [ValueError("y")])])
    with pytest.raises(ExceptionGroup), reporting_failures(direct, 0, cause_of):
        raise error
    [told] = direct.monitor.status().failures
    assert (told.kind, told.message) == ("ExceptionGroup", "both (2 sub-exceptions): KeyError: 'x'; ValueError: y")


def test_a_block_that_ends_well_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    direct: Any = DirectMonitor(monkeypatch)
    with reporting_failures(direct, 0, cause_of):
        pass
    assert direct.monitor.status().failures == []


def raised_in(*files: str, error: BaseException) -> None:
    """Raise an error in a file that was called from another, and that from another."""
    names = {"go_on": lambda: raised_in(*files[1:], error=error) if files[1:] else fail(error)}
    exec(compile("go_on()", files[0], "exec"), names)


STDLIB = Path(sysconfig.get_path("stdlib"))


@pytest.mark.parametrize(
    ("project", "files"),
    [
        ("/project", ["nets.py"]),
        ("/project", ["/else/loop.py", "nets.py", "/else/module.py"]),
        ("/project", [".venv/lib/python3.11/site-packages/torch/module.py", "nets.py", "env/site-packages/a.py"]),
        ("/project", ["/project-2/net.py", "usr/lib/python3/dist-packages/net.py", "nets.py"]),
        (str(STDLIB.parent), [f"{STDLIB}/threading.py", "nets.py"]),
    ],
)
def test_a_traceback_begins_in_the_users_own_code(
    monkeypatch: pytest.MonkeyPatch, project: str, files: list[str]
) -> None:
    direct: Any = DirectMonitor(monkeypatch)
    with pytest.raises(ValueError, match="odd"), reporting_failures(direct, 0, cause_of, project):
        raised_in(*(str(Path(project, file)) for file in files), error=ValueError("odd"))
    [told] = direct.monitor.status().failures
    shown = [line for line in told.traceback.rpartition("Traceback")[2].splitlines() if "File" in line]
    assert shown[0].startswith(f'  File "{project}/nets.py"')


def test_raytorchs_own_files_are_not_the_users_where_they_are_in_its_project(monkeypatch: pytest.MonkeyPatch) -> None:
    direct: Any = DirectMonitor(monkeypatch)
    package = Path(raytorch.__file__).parent
    with pytest.raises(SystemExit), reporting_failures(direct, 0, cause_of, str(package)):
        raised_in(str(package / "training/loop.py"), error=SystemExit())
    assert direct.monitor.status().failures == []


class Odd(BaseException):
    """What a user's own code may raise as well."""


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), Odd("nothing")])
def test_what_ends_a_process_is_a_failure_where_own_code_raises_it(
    monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    direct: Any = DirectMonitor(monkeypatch)
    with pytest.raises(type(error)), reporting_failures(direct, 0, cause_of, "/project"):
        raised_in("/else/loop.py", "/project/nets.py", error=error)
    [told] = direct.monitor.status().failures
    assert (told.kind, told.cause, told.expected) == (type(error).__name__, Cause.ERROR, False)
    for project in ("/another", None):
        other: Any = DirectMonitor(monkeypatch)
        fresh = type(error)()
        with pytest.raises(type(error)), reporting_failures(other, 0, cause_of, project):
            raised_in("/else/loop.py", "/project/nets.py", error=fresh)
        assert other.monitor.status().failures == []
