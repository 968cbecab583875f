"""The errors that raytorch raises: one tree, each with a message that says what to do.

Every error is built from its message alone, so it survives pickling between processes.
"""

from raytorch.causes import Cause
from raytorch.text import without_secrets


class RaytorchError(Exception):
    """Base of every error that raytorch raises. The key and secret of an address are not in its message."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(without_secrets(value) if isinstance(value, str) else value for value in args))


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


class DivergedError(RaytorchError):
    """The loss became NaN or infinite."""


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
