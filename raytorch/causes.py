"""Why a run failed, in the words of its ``summary.json``. Imports nothing else of raytorch, neither torch nor ray."""

import errno
import re
from collections.abc import Iterator, Sequence
from enum import StrEnum


class Cause(StrEnum):
    """The kind of thing that ended a run before its time."""

    ERROR = "error"
    """The program, or its input, is wrong: an exception that a restart would only meet again."""
    LOST_NODE = "lost_node"
    """A machine of the cluster went away."""
    LOST_WORKER = "lost_worker"
    """A worker's process died without a word (killed, or crashed), or its GPU failed."""
    LOST_RAY = "lost_ray"
    """A part of Ray that no run can do without died: its monitor or controller, the job's supervisor, raylet, GCS."""
    HOST_MEMORY = "host_memory"
    """A machine had no memory left for a worker."""
    GPU_MEMORY = "gpu_memory"
    """A GPU had no memory left."""
    TIMEOUT = "timeout"
    """A worker waited for the others in vain."""
    STORAGE = "storage"
    """The run's storage, or a worker's disk, is full, may not be written, or does not answer."""

    @property
    def is_final(self) -> bool:
        """Whether a worker that raised this is not restarted: it would only come to the same end."""
        return self in (Cause.ERROR, Cause.HOST_MEMORY, Cause.GPU_MEMORY, Cause.STORAGE)

    @property
    def advice(self) -> str:
        """What happened and what to do about it, in a line; empty for errors, which speak for themselves."""
        return _ADVICE.get(self, "")


_ADVICE = {
    Cause.LOST_NODE: (
        "a node of the cluster was lost; raytorch train --resume goes on from the latest checkpoint, for a job "
        "raytorch submit --resume does, and failure.max_restarts says how often a run does so by itself"
    ),
    Cause.LOST_WORKER: (
        "a worker was lost, killed or crashed; raytorch train --resume goes on from the latest checkpoint, for a job "
        "raytorch submit --resume does, and failure.max_restarts says how often a run does so by itself"
    ),
    Cause.LOST_RAY: (
        "a part of Ray was lost, killed or crashed, for want of memory, say; raytorch train --resume goes on from the "
        "latest checkpoint, for a job raytorch submit --resume does"
    ),
    Cause.HOST_MEMORY: (
        "the machine's memory ran out; use fewer workers on each machine (a higher scaling.cpus_per_worker), or lower "
        "batch_size"
    ),
    Cause.GPU_MEMORY: "the GPU's memory ran out; raise accumulate, which keeps batch_size, or lower batch_size",
    Cause.TIMEOUT: (
        "workers waited for one another longer than scaling.timeout_s; look into the logs for one that hangs or is far "
        "behind, or raise it"
    ),
    Cause.STORAGE: (
        "the storage failed; make room or mend the access to it, after which raytorch train --resume goes on from the "
        "latest checkpoint, for a job raytorch submit --resume does"
    ),
}

MOST_LEAVES = 5
"""Exceptions of a group that its message tells."""


def message_of(error: BaseException) -> str:
    """What an exception says; of a group also what the exceptions in it say."""
    if not isinstance(error, BaseExceptionGroup):
        return str(error)
    return message_of_group(str(error), [f"{type(leaf).__name__}: {leaf}".partition("\n")[0] for leaf in leaves(error)])


def message_of_group(message: str, told: Sequence[str]) -> str:
    """A group's message with those of its exceptions."""
    more = [f"and {len(told) - MOST_LEAVES} more"] if len(told) > MOST_LEAVES else []
    return f"{message}: {'; '.join([*told[:MOST_LEAVES], *more])}"


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The exceptions in a group and in the groups inside it; any other exception alone."""
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from leaves(each)
    else:
        yield error


STORAGE_FAULT = re.compile(
    r"No space left on device|Disk quota exceeded|Read-only file system|File too large|Input/output error"
    r"|Stale file handle|Transport endpoint is not connected|PytorchStreamWriter failed"
    r"|inline_container\.cc:\d+\] \. unexpected pos"
)
"""What errors say that come from a storage, not all of which are an ``OSError``."""
_STORAGE_ERRNOS = frozenset(
    number
    for name in ("ENOSPC", "EDQUOT", "EROFS", "EFBIG", "EIO", "ESTALE", "ENOTCONN", "ENODEV", "ENXIO")
    if (number := getattr(errno, name, None))
)


def is_storage_fault(error: BaseException) -> bool:
    """Whether an exception comes from a storage that is full, may not be written, or has failed."""
    return (isinstance(error, OSError) and error.errno in _STORAGE_ERRNOS) or bool(STORAGE_FAULT.search(str(error)))
