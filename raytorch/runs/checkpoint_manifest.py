"""The checkpoints in a run's folder: their names, what they list, and which are complete."""

import re
from collections.abc import Collection
from pathlib import Path

from raytorch.errors import CheckpointError, RecordError, RunNotFoundError
from raytorch.runs.records import CheckpointManifest, read_record
from raytorch.runs.storage import RunFolder

THE_MODEL = "model"
"""Name of the model of a run that has one."""
MODEL_FILE = "model.safetensors"
"""The file of a checkpoint that has its weights and architecture."""
MODEL_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
"""Every name that a model of a loop can have."""
_MODELS = re.compile(rf"model(-(?P<name>{MODEL_NAME.pattern}))?(-[0-9]{{5}}-of-[0-9]{{5}})?\.safetensors")
_TAG = re.compile(r"\.[0-9a-f]{8}(?=\.(safetensors|json)$)")
CHECKPOINT_PREFIX = "checkpoint_"
CHECKPOINT_NAME = re.compile(rf"{CHECKPOINT_PREFIX}([0-9]{{8}}|[1-9][0-9]{{8,11}})")
"""Every name that a checkpoint's folder can have; folders of other names are no business of raytorch's."""
CHECKPOINT_MANIFEST = "checkpoint.json"
"""The file of a checkpoint that is written last and lists the others."""
STRUCTURE_FILE = "state.json"
"""The file of a checkpoint that has what is no tensor of the rest of its state."""
STATE_FILE = "state.safetensors"
"""The file of a checkpoint that has the tensors of the rest of its state."""
CHECKPOINT_FORMAT = 5
"""1 had a pickle of tensors, ``state.pt``; 2 the state of the shipped loop alone; 3 the order of an epoch's samples; 4
no checksums, and all in one piece.
"""
READ_FORMATS = (4, 5)
RESUME_FROM_ANOTHER = "delete that checkpoint to resume from the one before it"


def model_file(name: str) -> str:
    """The file of a checkpoint that has the model of that name."""
    return MODEL_FILE if name == THE_MODEL else f"model-{name}.safetensors"


def model_names(files: Collection[str]) -> list[str]:
    """The names of the models that are among a checkpoint's files.

    Example:
        >>> model_names(["model-critic.safetensors", "model-00001-of-00002.safetensors", "state.json"])
        ['critic', 'model']
    """
    found = {_MODELS.fullmatch(untagged(file)) for file in files}
    return sorted({match["name"] or THE_MODEL for match in found if match and match["name"] != THE_MODEL})


def tagged(file: str, tag: str) -> str:
    """The name of a file that is to be beside one of another save of the same step.

    Example:
        >>> tagged("model-critic.safetensors", "1f0c93aa")
        'model-critic.1f0c93aa.safetensors'
    """
    stem, _, suffix = file.rpartition(".")
    return f"{stem}.{tag}.{suffix}"


def untagged(file: str) -> str:
    """The name that :func:`tagged` was given; one without a tag stays."""
    return _TAG.sub("", file)


def files_of(manifest: CheckpointManifest, file: str) -> list[str]:
    """The files of a checkpoint, by their names there, that hold ``file`` or pieces of it."""
    return [name for name in manifest.files if untagged(name) == file or _is_piece(untagged(name), file)]


def _is_piece(name: str, file: str) -> bool:
    stem, _, suffix = file.rpartition(".")
    return bool(re.fullmatch(rf"{re.escape(stem)}-[0-9]{{5}}-of-[0-9]{{5}}\.{re.escape(suffix)}", name))


def files_of_checkpoint(folder: RunFolder, name: str) -> set[str]:
    """The files that a checkpoint's manifest lists; none where it has no manifest."""
    try:
        return set(read_manifest(folder, name).files)
    except (RunNotFoundError, CheckpointError):
        return set()


def latest_checkpoint(folder: RunFolder) -> str | None:
    """Name of the newest complete checkpoint in a run's folder."""
    names = checkpoint_names(folder)
    return next((name for name in reversed(names) if is_complete_checkpoint(folder, name)), None)


def checkpoint_name(step: int) -> str:
    """Name of the checkpoint's folder after so many optimizer steps."""
    return f"{CHECKPOINT_PREFIX}{step:08d}"


def checkpoint_step(name: str) -> int:
    """The step that :func:`checkpoint_name` was given."""
    return int(name.removeprefix(CHECKPOINT_PREFIX))


def checkpoint_names(folder: RunFolder) -> list[str]:
    """The folders in a run's that are named as checkpoints are, complete or not, oldest first."""
    return sorted(filter(CHECKPOINT_NAME.fullmatch, folder.folders()), key=checkpoint_step)


def is_complete_checkpoint(folder: RunFolder, name: str) -> bool:
    """Tell whether all files that a checkpoint's manifest lists are there in full size."""
    try:
        sizes = read_manifest(folder, name).files
    except (RunNotFoundError, CheckpointError):  # not there, no longer there, or damaged
        return False
    return all(folder.size(f"{name}/{file}") == size for file, size in sizes.items())


def read_manifest(folder: RunFolder, name: str) -> CheckpointManifest:
    """Return what a checkpoint says of itself. Raises RunNotFoundError, and CheckpointError where that is damaged."""
    try:
        return read_record(folder, f"{name}/{CHECKPOINT_MANIFEST}", CheckpointManifest)
    except RecordError as error:
        raise CheckpointError(f"{error}; {RESUME_FROM_ANOTHER}") from None


def require_format(manifest: CheckpointManifest, path: str) -> None:
    """Refuse a checkpoint, which is at ``path``, that this raytorch cannot go on from. Raises CheckpointError."""
    if manifest.format not in READ_FORMATS:
        raise CheckpointError(
            f"{path} has format {manifest.format}, which cannot be resumed; this raytorch reads format "
            f"{' and '.join(map(str, READ_FORMATS))}; resume it with the raytorch that wrote it, or take its weights "
            f"alone, with raytorch.serialization.load_model({str(Path(path) / MODEL_FILE)!r})"
        )
