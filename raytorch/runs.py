"""The runs of a storage: planning a new one, finding and listing old ones. Imports neither torch nor ray."""

import logging
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from raytorch.config import RunConfig, RunName, StoredData
from raytorch.config.resuming import refused_changes, rule_of
from raytorch.config_file import parse
from raytorch.errors import CheckpointError, ConfigError, RecordError, RunExistsError, RunNotFoundError, UserError
from raytorch.metrics import METRICS_FILE, read_metrics
from raytorch.processes import Process
from raytorch.records import CheckpointManifest, Summary, moment, read_record
from raytorch.storage import RunFolder, absolute, in_job, is_relative, locate, run_folders, split
from raytorch.text import shown

LONGEST_NAME = 128
"""Characters of a run's name at most; see RunName."""
CONFIG_FILE = "config.yaml"
SUMMARY_FILE = "summary.json"
MODEL_FILE = "model.safetensors"
"""The file of a checkpoint that has the model's weights and architecture."""
CHECKPOINT_PREFIX = "checkpoint_"
CHECKPOINT_NAME = re.compile(rf"{CHECKPOINT_PREFIX}[0-9]{{8,12}}")
"""Every name that a checkpoint's folder can have; folders of other names are no business of raytorch's."""
CHECKPOINT_MANIFEST = "checkpoint.json"
"""The file of a checkpoint that is written last and lists the others."""
CHECKPOINT_FORMAT = 2
"""1 had a pickle of tensors, ``state.pt``."""
RESUME_FROM_ANOTHER = "delete that checkpoint to resume from the one before it"
HEARTBEAT_S = 30.0
"""Seconds between two signs of life of a run's driver in its summary."""
LOST_AFTER_S = 150.0
"""Seconds without one after which a run whose driver cannot be looked for is lost; more than clocks differ."""
LONGEST_HISTORY = 500_000
"""Lines of a run's metrics that are kept in memory, the newest."""

logger = logging.getLogger("raytorch")


@dataclass(frozen=True)
class RunPlan:
    """A configuration that is ready to run: with its final name and absolute paths."""

    config: RunConfig

    @property
    def folder(self) -> RunFolder:
        """The run's folder."""
        return RunFolder(self.config.storage, self.config.name)


def plan_run(config: RunConfig, name: str | None = None) -> RunPlan:
    """Plan a new run, called ``name`` or by the configuration's name and the time.

    Raises:
        RunExistsError: The storage holds a run of that name already.
        ConfigError: ``name`` cannot name a folder everywhere.
    """
    name = checked_name(name) if name is not None else timed_name(config.name)
    plan = RunPlan(placed(config, name, config.storage))
    if plan.folder.exists(CONFIG_FILE) or latest_checkpoint(plan.folder):
        raise RunExistsError(f"{plan.folder} exists already; take another --name, or continue it with --resume {name}")
    return plan


def timed_name(name: str, suffix: str = "") -> str:
    """``name`` with the time, and ``suffix`` where names are made faster than seconds pass."""
    time = f"-{datetime.now():%Y%m%d-%H%M%S}{suffix}"
    return name[: LONGEST_NAME - len(time)] + time


def checked_name(name: str) -> str:
    """``name``, if a run can have it.

    Raises:
        ConfigError: It cannot name a folder everywhere.
    """
    try:
        return TypeAdapter(RunName).validate_python(name)
    except ValidationError:
        raise ConfigError(
            f"--name {name}: must be 1 to {LONGEST_NAME} letters, digits, '.', '_' or '-', of which the first is a "
            "letter or digit"
        ) from None


def plan_resume(run: str, config: RunConfig | None = None, *, storage: str = "runs") -> RunPlan:
    """Plan to continue a run from its latest complete checkpoint; one that has saved none yet starts again.

    Args:
        run: The run's name or path.
        config: A changed configuration (more epochs, other workers); by default the run's own.
        storage: Where to look for a run that is given by its name, if there is no ``config``.

    Raises:
        RunNotFoundError: There is no such run.
        ConfigError: A key has changed that must not (see :mod:`raytorch.config.resuming`); or the run's own
            configuration is unreadable.
        CheckpointError: The checkpoint has the format of another raytorch.
    """
    folder = find_run(run, config.storage if config else storage)
    before = _read_config(folder)  # its name and storage are those of the folder, which may have been moved or copied
    config = placed(config, folder.name, folder.storage) if config else before
    latest, source = latest_checkpoint(folder), CONFIG_FILE
    if latest:
        manifest, source = read_manifest(folder, latest), f"{latest}/{CHECKPOINT_MANIFEST}"
        require_format(manifest, folder.file(latest))
        _require_more_to_do(config, manifest, folder.file(source))
        before = _saved_config(manifest, before)
    for key, there, here in refused_changes(before, config):
        raise ConfigError(
            f"{key} is {there} in the run that is resumed ({folder.file(source)}) and cannot become {here}: "
            f"{rule_of(key).remark}; give it as it was, or begin a new run"
        )
    return RunPlan(config)


def _saved_config(manifest: CheckpointManifest, otherwise: RunConfig) -> RunConfig:
    """The configuration that a checkpoint was trained by; its ``config.yaml`` may have been edited since then."""
    try:
        return placed(RunConfig.model_validate(manifest.config), otherwise.name, otherwise.storage)
    except ValidationError:  # of another version of raytorch
        return otherwise


def _require_more_to_do(config: RunConfig, manifest: CheckpointManifest, path: str) -> None:
    for key, wanted, done in (("steps", config.steps, manifest.step), ("epochs", config.epochs, manifest.epoch)):
        if wanted is not None and wanted < done:
            raise ConfigError(
                f"{key} is {wanted:,}, but the run that is resumed has done {done:,g} already ({path}); give at least "
                f"as many"
            )


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
    named = [name for name in folder.folders() if CHECKPOINT_NAME.fullmatch(name)]
    return sorted((name for name in named if name == checkpoint_name(checkpoint_step(name))), key=checkpoint_step)


def is_complete_checkpoint(folder: RunFolder, name: str) -> bool:
    """Whether all files that a checkpoint's manifest lists are there in full size."""
    try:
        sizes = read_manifest(folder, name).files
    except (RunNotFoundError, CheckpointError):  # not there, no longer there, or damaged
        return False
    return all(folder.size(f"{name}/{file}") == size for file, size in sizes.items())


def read_manifest(folder: RunFolder, name: str) -> CheckpointManifest:
    """What a checkpoint says of itself.

    Raises:
        RunNotFoundError: There is no such checkpoint.
        CheckpointError: What it says is damaged, or no file that raytorch writes.
    """
    try:
        return read_record(folder, f"{name}/{CHECKPOINT_MANIFEST}", CheckpointManifest)
    except RecordError as error:
        raise CheckpointError(f"{error}; {RESUME_FROM_ANOTHER}") from None


def require_format(manifest: CheckpointManifest, path: str) -> None:
    """Refuse a checkpoint, which is at ``path``, that this raytorch cannot go on from. Raises CheckpointError."""
    if manifest.format != CHECKPOINT_FORMAT:
        raise CheckpointError(
            f"{path} has format {manifest.format}, which cannot be resumed; this raytorch reads format "
            f"{CHECKPOINT_FORMAT}; resume it with the raytorch that wrote it, or take its weights alone, with "
            f"raytorch.serialization.load_model({str(Path(path) / MODEL_FILE)!r})"
        )


def find_run(run: str, storage: str) -> RunFolder:
    """The folder of a run that is given by its name in ``storage`` or by its path.

    Raises:
        RunNotFoundError: There is none.
    """
    if "/" in run:
        storage, run = split(run)
    if run not in ("", ".", "..") and _is_run(folder := RunFolder(storage, run)):
        return folder
    for _ in run_folders(storage):  # tells a bucket that is not there
        break
    raise RunNotFoundError(f"no run {run} in {storage}; 'raytorch runs --storage {storage}' lists them")


def list_runs(storage: str) -> list[dict[str, Any]]:
    """The summaries of all runs in a storage, oldest first; the state of a run whose driver is gone is ``lost``.

    A run that cannot be read is warned of, and the others are listed.
    """
    return sorted(_summaries(storage), key=lambda summary: str(summary["started"]))


def _summaries(storage: str) -> Iterator[dict[str, Any]]:
    for folder in run_folders(storage):
        try:
            if _is_run(folder):
                yield read_summary(folder)
        except UserError as error:
            logger.warning("%s", shown(error))


def read_summary(folder: RunFolder) -> dict[str, Any]:
    """A run's summary as it stands; of one that is missing or damaged no more than that the run is ``lost``.

    Its name and path are those of the folder, which may have been moved or copied. A damaged one is warned of.
    """
    place = {"name": folder.name, "path": str(folder)}
    try:
        summary = read_record(folder, SUMMARY_FILE, Summary)
    except (RunNotFoundError, RecordError) as error:
        if isinstance(error, RecordError):
            logger.warning("%s", shown(error))
        return {**place, "state": "lost", "started": ""}
    if summary.state == "running" and _driver_is_gone(summary):
        summary.state = "lost"
    return place | summary.model_dump(exclude_unset=True) | place


def read_history(folder: RunFolder) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``, the newest of very many; what is none is left out and warned of.

    So is the whole of it, if it is no file.
    """
    if not folder.exists(METRICS_FILE):
        return []
    try:
        with folder.open(METRICS_FILE) as stream:
            return list(deque(read_metrics(stream, folder.file(METRICS_FILE)), LONGEST_HISTORY))
    except RecordError as error:
        logger.warning("%s", shown(error))
        return []


def _is_run(folder: RunFolder) -> bool:
    """Whether a folder is a run's: the record of a submitted script has a summary but no configuration."""
    return folder.exists(CONFIG_FILE) or folder.exists(SUMMARY_FILE)


def _read_config(folder: RunFolder) -> RunConfig:
    """The configuration that a run was started with, under the folder's name and storage."""
    try:
        config = parse(folder.read_bytes(CONFIG_FILE), folder.file(CONFIG_FILE), RunConfig)
    except ConfigError as error:
        raise ConfigError(f"{error}\ncorrect the file to resume the run") from None
    return placed(config, folder.name, folder.storage)


def placed(config: RunConfig, name: str, storage: str) -> RunConfig:
    """``config`` under its final name, with paths that hold whatever folder a worker runs in.

    Raises:
        UserError: As for :func:`full_root` and :func:`raytorch.storage.locate`.
    """
    data = config.data
    if isinstance(data, StoredData):
        data = data.model_copy(update={"root": full_root(data.root)})
    return config.model_copy(update={"name": name, "storage": locate(storage), "data": data})


def full_root(root: str) -> str:
    """``data.root`` made absolute.

    Raises:
        UserError: It is relative in a submitted job: below the job's folder, where no data was sent.
    """
    if in_job() and is_relative(root):
        raise UserError(
            f"data.root: {root} would be in the job's own folder on the cluster, where data is not sent; give the "
            "folder in full, as all nodes reach it, e.g. data.root=/shared/data"
        )
    return absolute(root)


def _driver_is_gone(summary: Summary) -> bool:
    """Whether the process that started a run has ended: known where it can be looked for, else told by its silence."""
    driver = summary.driver
    if driver is not None:
        process = Process(driver.host, driver.pid, driver.began, driver.boot, driver.namespace)
        if (alive := process.is_alive()) is not None:
            return not alive
    if summary.seen is None:
        return False
    silence = datetime.now().astimezone() - moment(summary.seen)
    return silence.total_seconds() > LOST_AFTER_S
