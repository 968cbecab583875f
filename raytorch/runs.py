"""The runs of a storage: planning a new one, finding and listing old ones. Imports neither torch nor ray."""

import os
import socket
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import yaml
from pyarrow import fs
from pydantic import TypeAdapter, ValidationError

from raytorch.config import RunConfig, RunName, StoredData
from raytorch.errors import ConfigError, RunExistsError, RunNotFoundError, UserError
from raytorch.metrics import METRICS_FILE, read_metrics
from raytorch.storage import RunFolder, absolute, in_job, is_relative, locate, open_storage, reaching, split

LONGEST_NAME = 128
"""Characters of a run's name at most; see RunName."""
CONFIG_FILE = "config.yaml"
SUMMARY_FILE = "summary.json"
MODEL_FILE = "model.safetensors"
"""The file of a checkpoint that has the model's weights and architecture."""
CHECKPOINT_PREFIX = "checkpoint_"
CHECKPOINT_MANIFEST = "checkpoint.json"
"""The file of a checkpoint that is written last and lists the others."""
HEARTBEAT_S = 30.0
"""Seconds between two signs of life of a run's driver in its summary."""
LOST_AFTER_S = 150.0
"""Seconds without one after which a run whose driver is on another host is lost; more than clocks differ."""


@dataclass(frozen=True)
class RunPlan:
    """A configuration that is ready to run: with its final name, absolute paths, and what it continues from."""

    config: RunConfig
    resume_from: str | None = None
    """Name of the checkpoint in the run's folder to begin with."""

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
    if plan.folder.exists(CONFIG_FILE):
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
        ConfigError: The changed configuration trains another model, or on other data; or the run's own is unreadable.
    """
    folder = find_run(run, config.storage if config else storage)
    latest = latest_checkpoint(folder)
    before = _read_config(folder)  # its name and storage are those of the folder, which may have been moved or copied
    if config is None:
        return RunPlan(before, latest)
    config = placed(config, folder.name, folder.storage)
    for part in ("data", "model", "seed", "batch_size"):
        if getattr(config, part) != getattr(before, part):
            raise ConfigError(
                f"{part} differs from the run that is resumed ({folder.file(CONFIG_FILE)}); it cannot change"
            )
    return RunPlan(config, latest)


def latest_checkpoint(folder: RunFolder) -> str | None:
    """Name of the newest complete checkpoint in a run's folder."""
    names = [name for name in folder.folders() if name.startswith(CHECKPOINT_PREFIX)]
    return next((name for name in reversed(names) if is_complete_checkpoint(folder, name)), None)


def is_complete_checkpoint(folder: RunFolder, name: str) -> bool:
    """Whether all files that a checkpoint's manifest lists are there in full size."""
    try:
        sizes = folder.read_json(f"{name}/{CHECKPOINT_MANIFEST}")["files"]
    except (RunNotFoundError, ValueError, KeyError, TypeError):  # not there, no longer there, or damaged
        return False
    infos = folder.filesystem.get_file_info([folder.file(f"{name}/{file}") for file in sizes])
    return all(info.size == size for info, size in zip(infos, sizes.values(), strict=True))


def find_run(run: str, storage: str) -> RunFolder:
    """The folder of a run that is given by its name in ``storage`` or by its path.

    Raises:
        RunNotFoundError: There is none.
    """
    if "/" in run:
        storage, run = split(run)
    folder = RunFolder(storage, run)
    if not _is_run(folder):
        raise RunNotFoundError(f"no run {run} in {storage}; 'raytorch runs --storage {storage}' lists them")
    return folder


def list_runs(storage: str) -> list[dict[str, Any]]:
    """The summaries of all runs in a storage, oldest first; the state of a run whose driver is gone is ``lost``."""
    filesystem, root = open_storage(storage)
    with reaching(storage):
        entries = filesystem.get_file_info(fs.FileSelector(root, allow_not_found=True))
    folders = [RunFolder(storage, entry.base_name) for entry in entries if entry.type == fs.FileType.Directory]
    summaries = [read_summary(folder) for folder in folders if _is_run(folder)]
    return sorted(summaries, key=lambda summary: str(summary["started"]))


def read_summary(folder: RunFolder) -> dict[str, Any]:
    """A run's summary as it stands; of one that is missing or damaged no more than that the run is ``lost``."""
    try:
        summary = folder.read_json(SUMMARY_FILE)
    except (RunNotFoundError, ValueError):
        return {"name": folder.name, "path": str(folder), "state": "lost", "started": ""}
    if summary["state"] == "running" and _driver_is_gone(summary):
        summary["state"] = "lost"
    return summary


def read_history(folder: RunFolder) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``."""
    return read_metrics(folder.read_text(METRICS_FILE)) if folder.exists(METRICS_FILE) else []


def _is_run(folder: RunFolder) -> bool:
    """Whether a folder is a run's: the record of a submitted script has a summary but no configuration."""
    return folder.exists(CONFIG_FILE) or folder.exists(SUMMARY_FILE)


def _read_config(folder: RunFolder) -> RunConfig:
    """The configuration that a run was started with, under the folder's name and storage."""
    try:
        config = RunConfig.model_validate(yaml.safe_load(folder.read_text(CONFIG_FILE)))
    except yaml.YAMLError as error:
        raise ConfigError(f"{folder.file(CONFIG_FILE)} is not YAML; correct it to resume the run: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"{folder.file(CONFIG_FILE)} does not fit this raytorch; correct it to resume the run: "
            f"{key}: {first['msg']}"
        ) from None
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


def _driver_is_gone(summary: dict[str, Any]) -> bool:
    """Whether the process that started a run has ended: known on its host, concluded from its silence on others."""
    if summary["driver"]["host"] != socket.gethostname():
        if "seen" not in summary:
            return False
        silence = datetime.now().astimezone() - datetime.fromisoformat(summary["seen"])
        return silence.total_seconds() > LOST_AFTER_S
    try:
        os.kill(summary["driver"]["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it runs, as another user
        return False
    return False
