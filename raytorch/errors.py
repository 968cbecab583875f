"""The errors that raytorch raises: one tree, each with a message that says what to do.

Every error is built from its message alone, so it survives pickling between processes.
"""


class RaytorchError(Exception):
    """Base of every error that raytorch raises."""


class UserError(RaytorchError):
    """The input has to change before a retry can succeed; the command line exits with status 2."""


class ConfigError(UserError):
    """A run's configuration is invalid."""


class DataError(UserError):
    """A data set is missing, incomplete or corrupt."""


class ResourceError(UserError):
    """The machine or cluster cannot give what the run asks for."""


class RunExistsError(UserError):
    """A run of that name exists already in the storage."""


class RunNotFoundError(UserError):
    """No run of that name is in the storage, or it left nothing to resume from."""


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
