"""The errors that raytorch raises: one tree, each with a message that says what to do; and the causes of failure.

Every error is built from its message alone, so it survives pickling between processes. A :class:`Cause` is the word for
why a run failed, as its ``summary.json`` has it.
"""

import errno
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from raytorch.system.safe_text import cut, without_secrets


class Cause(StrEnum):
    """The kind of thing that ended a run before its time."""

    ERROR = "error"
    """The program, or its input, is wrong: an exception that a restart would only meet again."""
    LOST_NODE = "lost_node"
    """A machine of the cluster went away."""
    LOST_WORKER = "lost_worker"
    """A worker's process or one that reads for it died without a word (killed, or crashed), or its GPU failed."""
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
        """True if a worker that raised this is not restarted: it would only come to the same end."""
        return self in (Cause.ERROR, Cause.HOST_MEMORY, Cause.GPU_MEMORY, Cause.STORAGE)

    @property
    def is_resumable(self) -> bool:
        """True if the run can go on from its latest checkpoint as it is."""
        return self in (Cause.LOST_NODE, Cause.LOST_WORKER, Cause.LOST_RAY, Cause.STORAGE)

    @property
    def advice(self) -> str:
        """What happened and what to do about it, in a line; empty for errors, which speak for themselves."""
        return _ADVICE.get(self, "")


_ADVICE = {
    Cause.LOST_NODE: (
        "a node of the cluster was lost; resume goes on from the latest checkpoint, and "
        "failure.max_restarts says how often a run does so by itself"
    ),
    Cause.LOST_WORKER: (
        "a worker was lost, killed or crashed; resume goes on from the latest checkpoint, and "
        "failure.max_restarts says how often a run does so by itself"
    ),
    Cause.LOST_RAY: (
        "a part of Ray was lost, killed or crashed, for want of memory, say; resume goes on from the latest checkpoint"
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
        "the storage failed; make room or mend the access to it, after which resume goes on from the latest checkpoint"
    ),
}

MOST_LEAVES = 5
"""Exceptions of a group that its message tells."""


def message_of(error: BaseException) -> str:
    """Return what an exception says, with its notes and without the middle if it is very long; of a group also what
    those in it say.
    """
    if not isinstance(error, BaseExceptionGroup):
        return cut("\n".join([_said(error), *map(str, getattr(error, "__notes__", ()))]))
    told = [f"{type(leaf).__name__}: {_said(leaf)}".partition("\n")[0] for leaf in leaves(error)]
    return cut(message_of_group(_said(error), told))


def _said(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # of its class's own, which may be wrong
        return "<exception str() failed>"  # as Python prints it


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
"""Texts of errors that come from a storage, not all of which are an ``OSError``."""
_STORAGE_ERRNOS = frozenset(
    number
    for name in ("ENOSPC", "EDQUOT", "EROFS", "EFBIG", "EIO", "ESTALE", "ENOTCONN", "ENODEV", "ENXIO")
    if (number := getattr(errno, name, None))
)


def is_storage_fault(error: BaseException) -> bool:
    """Tell whether an exception comes from a storage that is full, may not be written, or has failed."""
    return (isinstance(error, OSError) and error.errno in _STORAGE_ERRNOS) or bool(STORAGE_FAULT.search(_said(error)))


@dataclass(frozen=True)
class Remedy:
    """Something to give in another call, by the name of the parameter and of the command line's option; or a call.

    Calls are ``list_runs`` of a storage, ``jobs``, ``follow`` of a job, and ``prepare``, a data set in a folder.
    """

    name: str
    value: str = ""
    """The value to give there, where that is known: for ``resume`` the run or sweep."""
    of: Literal["run", "sweep", "job", "mnist", "cifar10"] = "run"


class RaytorchError(Exception):
    """Base of every error that raytorch raises. The key and secret of an address are not in its message.

    Attributes:
        remedies: What may be given another time, apart from the words of the message.
    """

    def __init__(self, *args: object, remedies: Sequence[Remedy] = ()) -> None:
        super().__init__(*(without_secrets(value) if isinstance(value, str) else value for value in args))
        self.remedies = tuple(remedies)


class UserError(RaytorchError):
    """The input has to change before a retry can succeed; the command line exits with status 2."""


class ConfigError(UserError):
    """A run's configuration is invalid."""


class DataError(UserError):
    """A data set is missing, incomplete or corrupt."""


class ResourceError(UserError):
    """The machine or cluster cannot give what the run asks for."""


class ClusterError(UserError):
    """A cluster does not answer, or refuses what is asked of it: its token is missing or wrong, say."""


class JobNotFoundError(UserError):
    """The cluster has no job of that name."""


class PackageError(UserError):
    """A project's files cannot be sent to the cluster."""


class StorageError(UserError):
    """A storage is full, cannot be reached, or may not be read or written."""


class MissingPackageError(UserError):
    """A package that not everybody needs is not installed; one of raytorch's extras brings it."""


class RunExistsError(UserError):
    """A run of that name exists already in the storage."""


class RunNotFoundError(UserError):
    """No run of that name is in the storage, or it left nothing to resume from."""


class RecordError(UserError):
    """A file that raytorch keeps of a run, a sweep or a session is damaged, or is none of raytorch's."""


class ModelFileError(UserError):
    """A model's file is missing, damaged, or of another format than the one expected."""


class UntrustedFileError(ModelFileError):
    """A file could run its author's code when it is read, and the caller has not said that it may."""


class CheckpointError(RaytorchError):
    """A checkpoint is incomplete, corrupt or does not fit the run."""


class ReaderDiedError(RaytorchError):
    """A process that reads a data set ahead died."""


class DivergedError(RaytorchError):
    """The loss became NaN or infinite, or gradients overflow in fp16 however the loss is scaled."""


class ExportError(RaytorchError):
    """A model cannot be exported, or its export computes something else."""


class TrainingError(RaytorchError):
    """A worker raised or died; the message ends with the first failing rank's own traceback."""


class JobError(RaytorchError):
    """A job ended without a result; the message says why."""


class SessionError(RaytorchError):
    """A session was used in a way that cannot work: tensors of two sessions in one call, a name that is taken."""


class HandleError(SessionError):
    """A handle names nothing, nothing of that kind, or something of another session."""


class QuotaError(SessionError):
    """An operation would hold more bytes than the session may."""


class UnknownFunctionError(SessionError):
    """A function is not among those that instructions can name."""


class SessionLostError(SessionError):
    """A session has ended: a worker died, its time ran out, or it was closed. Nothing more can be asked of it."""


class RemoteOpError(SessionError):
    """An operation failed on a worker.

    Attributes:
        operation: Name of the function, such as ``torch.Tensor.matmul``.
        rank: The worker's rank.
        file: The client's file that recorded the operation.
        line: The line in it.
        instruction: Number of the client's program and place in it: the same on every rank.
        cause: The kind of failure.
    """

    operation: str = ""
    rank: int = 0
    file: str = ""
    line: int = 0
    instruction: tuple[int, int] = (0, 0)
    cause: Cause = Cause.ERROR

    @classmethod
    def describing(
        cls, *, operation: str, arguments: str, rank: int, file: str, line: int, reason: str, traceback: str = ""
    ) -> "RemoteOpError":
        """The error of one failed operation; ``arguments`` are its shapes and values, ``reason`` the worker's error."""
        where = f"{operation}({arguments}) failed on rank {rank}\n  recorded at {file}:{line}\n  {reason}"
        error = cls(f"{where}\n{traceback}" if traceback else where)
        error.operation, error.rank, error.file, error.line = operation, rank, file, line
        return error


@contextmanager
def needing_extra(extra: str) -> Iterator[None]:
    """Import in the block what an extra of raytorch brings. Raises MissingPackageError."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise MissingPackageError(f"{package} is not installed here: pip install 'raytorch[{extra}]'") from None
