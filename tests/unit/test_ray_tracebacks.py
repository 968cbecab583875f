"""What is told of errors that Ray and Ray Train print, in their own words for them: a program's output as it is."""

import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.worker_group.poll import WorkerGroupPollStatus, WorkerStatus

from raytorch.errors import message_of
from raytorch.service.job import failure_told
from raytorch.service.tracebacks import last_traceback


def raising(error: BaseException) -> Callable[[], None]:
    def call() -> None:
        raise error.with_traceback(None)  # without the frames of an earlier test

    return call


def printed(call: Callable[[], None]) -> tuple[str, BaseException]:
    """What the interpreter prints of a function's exception, and the exception."""
    try:
        call()
    except BaseException as error:
        return traceback.format_exc(), error
    raise AssertionError


def from_task(call: Callable[[], None], name: str = "square", **actor: Any) -> Exception:
    """What ``ray.get`` raises where a task raised."""
    text, error = printed(call)
    cause = error.cause if isinstance(error, RayTaskError) else error  # as Ray's workers do
    failed = RayTaskError(
        function_name=name, traceback_str=text, cause=cause, pid=12, ip="10.0.0.1", proctitle=f"ray::{name}", **actor
    )
    raised: Exception = failed.as_instanceof_cause()
    return raised


def chained() -> None:
    try:
        raise ZeroDivisionError("of\ntwo lines")
    except ArithmeticError as error:
        raise KeyError("x") from error


def bare(error: Exception) -> Exception:
    """A Ray task's error where its cause's class cannot be inherited from."""
    text, cause = printed(raising(error))
    return RayTaskError(function_name="f", traceback_str=text, cause=cause, pid=12, ip="::1", proctitle="ray::f")


KEY = KeyError("x")
INNER = from_task(raising(KEY))
ACTOR = from_task(raising(KEY), "Counter.add", actor_repr="Counter(at=<here>)", actor_id="ab12")
NESTED = from_task(raising(INNER), "outer")


@pytest.mark.parametrize(
    ("error", "kind", "message", "cause"),
    [
        (INNER, "KeyError", "'x'", "error"),
        (ACTOR, "KeyError", "'x'", "error"),
        (NESTED, "KeyError", "'x'", "error"),
        (from_task(raising(ACTOR), "Outer.add", actor_repr="Outer", actor_id="cd34"), "KeyError", "'x'", "error"),
        (bare(INNER), "KeyError", "'x'", "error"),
        (from_task(chained), "KeyError", "'x'", "error"),
        (from_task(raising(MemoryError())), "MemoryError", "MemoryError", "host_memory"),
        (
            from_task(raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))),
            "OutOfMemoryError",
            "CUDA out of memory. Tried to allocate 2 GiB",
            "gpu_memory",
        ),
    ],
)
@pytest.mark.parametrize("before", ["", "\x1b[36m(driver pid=7)\x1b[0m "])
def test_a_tasks_error_is_told_as_the_tasks_own(
    error: Exception, kind: str, message: str, cause: str, before: str
) -> None:
    text = printed(raising(error))[0]
    marked = "".join(f"{before}{line}\n" for line in text.splitlines())
    told = failure_told(f"begun\n{marked}{before}and on\n{before}  indented\nend\n")
    assert told is not None
    assert (told.kind, told.message, told.cause, told.rank) == (kind, message, cause, None)
    assert told.traceback is not None
    assert "\x1b" not in told.traceback
    assert told.traceback.count(", in call\n") == text.count(", in call\n")
    assert told.traceback.splitlines()[-1].endswith(message)


def test_an_actor_that_its_constructor_ended() -> None:
    error = ActorDiedError(bare(ValueError("no such file")))
    told = failure_told(printed(raising(error))[0])
    assert told is not None
    assert (told.kind, told.message) == ("ValueError", "no such file")


def twisted() -> ExceptionGroup:
    """A group of an exception with a cause, one of two lines, and a group of six."""
    try:
        chained()
    except KeyError as error:
        caught = error
    inner = ExceptionGroup("inner", [OSError(number) for number in range(6)])
    return ExceptionGroup("several", [caught, ValueError("one\nline"), inner])


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            ExceptionGroup("both", [KEY, TypeError()]),
            "ExceptionGroup",
            "both (2 sub-exceptions): KeyError: 'x'; TypeError",
        ),
        (
            BaseExceptionGroup("left", [SystemExit(3)]),
            "BaseExceptionGroup",
            "left (1 sub-exception): SystemExit: 3",
        ),
        (
            twisted(),
            "ExceptionGroup",
            "several (3 sub-exceptions): KeyError: 'x'; ValueError: one; OSError: 0; OSError: 1; OSError: 2; "
            "and 3 more",
        ),
    ],
)
@pytest.mark.parametrize("before", ["", "\x1b[36m(driver pid=7)\x1b[0m "])
def test_a_group_is_told_with_what_its_exceptions_say(
    error: BaseException, kind: str, message: str, before: str
) -> None:
    text = printed(raising(error))[0]
    marked = "".join(f"{before}{line}\n" for line in text.splitlines())
    told = failure_told(f"begun\n{marked}{before}and on\nend\n")
    assert told is not None
    assert (told.kind, told.message, told.rank) == (kind, message, None)
    assert told.traceback == text.rstrip()
    assert message_of(error).replace("; TypeError: ", "; TypeError") == message


def test_a_tasks_group_is_told_likewise() -> None:
    told = failure_told(printed(raising(from_task(raising(ExceptionGroup("both", [KEY, MemoryError("no")])))))[0])
    assert told is not None
    assert told.message == "both (2 sub-exceptions): KeyError: 'x'; MemoryError: no"


def test_an_exception_that_follows_a_group_is_the_one_told() -> None:
    def call() -> None:
        try:
            raising(ExceptionGroup("both", [KEY, TypeError()]))()
        except ExceptionGroup:
            raise ValueError("after it")  # noqa: B904

    told = failure_told(printed(call)[0])
    assert told is not None
    assert (told.kind, told.message) == ("ValueError", "after it")


def test_a_message_that_looks_like_a_tasks_head_is_none() -> None:
    text = printed(raising(ValueError("worker (pid=3, ip=10.0.0.1) broke")))[0]
    assert last_traceback(f"{text}  indented\nValueError: another\n") == text.rstrip()


# -- Ray Train ---------------------------------------------------------------------------------------------------------

PEER = RuntimeError("[pair.cc:545] Read error [127.0.0.1]:61122: Connection reset by peer. This is typically caused by")
LABEL = ValueError("bad label on rank 0")
WORKER = """\
Worker info: Worker(
  actor=Actor(RayTrainWorker, 1221),
  distributed_context=DistributedContext(world_rank=0, world_size=2),
)"""


def died(text: str) -> Exception:
    error = ActorDiedError()
    error.error_msg = f"The actor died unexpectedly before finishing this task.\n\tpid: 1\n{text}"
    return WorkerHealthCheckFailedError(f"A worker health check failed.\n{WORKER}", error)


NODE = died("The actor died because its node has died. Node Id: 0a1b")
PROCESS = died("The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR")
MEMORY = WorkerHealthCheckFailedError(
    f"A worker health check failed.\n{WORKER}",
    OutOfMemoryError("Task was killed due to the node running low on memory."),
)
HANGING = WorkerHealthCheckTimeoutError(f"A worker health check has been hanging for 600.00 seconds.\n{WORKER}")


def of_group(*errors: Exception, frames: str = "") -> str:
    """What the driver of a training prints; each rank's error as Ray Train keeps and shows it.

    Args:
        *errors: The ranks' errors.
        frames: Further frames for their tracebacks.
    """

    def as_kept(error: Exception) -> Exception:
        if isinstance(error, (WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError)):
            return error
        head, text = printed(raising(error))[0].split("\n", 1)
        return UserExceptionWithTraceback(error, f"{head}\n{frames}{text}")

    ranks = {rank: WorkerStatus(running=False, error=as_kept(error)) for rank, error in enumerate(errors)}
    return printed(raising(WorkerGroupPollStatus(ranks).get_worker_group_error()))[0]


DEEP = "".join(f'  File "a.py", line {n}, in f{n}\n    f{n}(\n' for n in range(40))
CUT = "(Output truncated."


DIED = "The actor died unexpectedly before finishing this task."


@pytest.mark.parametrize(
    ("errors", "rank", "kind", "message", "cause"),
    [
        ((LABEL, PEER), 0, "ValueError", "bad label on rank 0", "error"),
        ((PEER, LABEL), 1, "ValueError", "bad label on rank 0", "error"),
        ((PEER, PEER, LABEL, PEER), 2, "ValueError", "bad label on rank 0", "error"),
        ((PEER, PEER), 0, "RuntimeError", str(PEER), "error"),
        ((LABEL, KEY), 0, "ValueError", "bad label on rank 0", "error"),
        ((PEER, NODE), 1, None, DIED, "lost_node"),
        ((PROCESS, PEER), 0, None, DIED, "lost_worker"),
        ((MEMORY, PEER), 0, None, "Task was killed due to the node running low on memory.", "host_memory"),
        ((HANGING,), 0, None, "A worker health check has been hanging for 600.00 seconds.", "timeout"),
        ((HANGING, LABEL), 1, "ValueError", "bad label on rank 0", "error"),
    ],
)
def test_rank_and_traceback_are_of_one_and_the_same_worker(
    errors: tuple[Exception, ...], rank: int, kind: str | None, message: str, cause: str
) -> None:
    for frames in ("", DEEP):
        output = of_group(*errors, frames=frames)
        assert (CUT in output) == (bool(frames) and errors != (HANGING,))
        told = failure_told(output)
        assert told is not None
        assert (told.rank, told.kind, told.message, told.cause) == (rank, kind, message, cause)
        assert (told.traceback is None) == (kind is None)
        if told.traceback is not None:
            assert told.traceback.splitlines()[-1] == f"{kind}: {message}"
            assert "Snippet" not in told.traceback


@pytest.mark.parametrize("more", range(40))
def test_wherever_ray_train_cuts_a_traceback(more: int) -> None:
    output = of_group(ValueError("v" * more), PEER, frames=f'  File "{"b" * more}.py", line 1, in b\n{DEEP}')
    assert CUT in output
    told = failure_told(output)
    assert told is not None
    assert (told.rank, told.kind) == (0, "ValueError")
    assert told.traceback is not None
    assert told.traceback.splitlines()[-1].startswith("ValueError")
    assert CUT in told.traceback


def test_the_last_attempt_counts() -> None:
    told = failure_told(f"{of_group(KEY, PEER)}restarted\n{of_group(PEER, LABEL)}")
    assert told is not None
    assert (told.rank, told.kind) == (1, "ValueError")


def test_a_controllers_lines_are_read_as_well() -> None:
    lines = of_group(LABEL, PEER, frames=DEEP).splitlines()
    told = failure_told("".join(f"\x1b[36m(TrainController pid=9)\x1b[0m {line}\n" for line in lines))
    assert told is not None
    assert (told.rank, told.kind) == (0, "ValueError")
    assert told.traceback is not None
    assert "TrainController" not in told.traceback


def test_a_message_longer_than_what_ray_train_shows() -> None:
    text = (
        "CUDA out of memory. Tried to allocate 20 GiB. "
        + 500 * "."
        + " try PYTORCH_CUDA_ALLOC_CONF=expandable_segments"
    )
    output = of_group(torch.OutOfMemoryError(text), frames=DEEP)
    assert CUT in output
    told = failure_told(output)
    assert told is not None
    assert (told.rank, told.cause) == (0, "gpu_memory")
    assert told.message == text[-499:]
