"""Where a new run's model begins: a file of weights, or a checkpoint of another run. Imports neither torch nor ray."""

from raytorch.config import RunConfig
from raytorch.errors import ConfigError, RunNotFoundError, UserError
from raytorch.runs.catalog import find_run
from raytorch.runs.checkpoint_manifest import CHECKPOINT_NAME, latest_checkpoint
from raytorch.runs.storage import RunFolder, absolute, is_in_job, is_relative, join, locate, split

FILE_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
"""Ends of the names of files; what has another name is a run."""


def is_weights_file(weights: str) -> bool:
    """Tell whether ``model.weights`` means a file; if not, it is a run.

    Example:
        >>> is_weights_file("stem.pt"), is_weights_file("digits-20261122-093625")
        (True, False)
    """
    path = weights.partition("?")[0] if "://" in weights else weights
    return path.lower().endswith(FILE_SUFFIXES)


def with_located_weights(config: RunConfig) -> RunConfig:
    """The run with ``model.weights`` in full: a file from the current folder, a run from the configuration's storage.

    Raises UserError for a file below a submitted job's folder, where none was sent.
    """
    weights = config.model.weights
    if weights is None:
        return config
    if not is_weights_file(weights):
        place = locate(weights if "/" in weights else join(locate(config.storage), weights))
    elif is_in_job() and is_relative(weights):
        raise UserError(
            f"model.weights: {weights} would be in the job's own folder on the cluster; give the file in full, as all "
            "nodes reach it, e.g. model.weights=/shared/stem.safetensors"
        )
    else:
        place = absolute(weights)
    return config.model_copy(update={"model": config.model.model_copy(update={"weights": place})})


def find_checkpoint(weights: str) -> tuple[RunFolder, str]:
    """The run that ``model.weights`` names in full, and the checkpoint to take: its latest, unless it names one.

    Raises ConfigError if there is none.
    """
    above, name = split(weights)
    is_checkpoint = CHECKPOINT_NAME.fullmatch(name) is not None
    try:
        folder = find_run(above if is_checkpoint else weights, "")
    except RunNotFoundError as error:
        raise ConfigError(
            f"model.weights: {error}; the name of a file of weights ends with one of {', '.join(FILE_SUFFIXES)}"
        ) from None
    found = name if is_checkpoint else latest_checkpoint(folder)
    if found is None:
        raise ConfigError(f"model.weights: {folder} has no complete checkpoint; train it first")
    return folder, found
