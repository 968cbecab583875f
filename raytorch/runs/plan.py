"""Planning a run: a new one, or one that goes on from its latest checkpoint. Imports neither torch nor ray."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from raytorch.config import CodeSnapshot, RunConfig, RunName, data_root
from raytorch.config.code_snapshot import changed_files, masked_copies
from raytorch.config.file import dump_config, parse, with_own_code
from raytorch.config.resuming import refused_changes, rule_of
from raytorch.config.run_name import LONGEST_NAME, NAME_FORM
from raytorch.errors import ConfigError, Remedy, RunExistsError, UserError
from raytorch.runs.catalog import CONFIG_FILE, SUMMARY_FILE, find_run, read_summary
from raytorch.runs.checkpoint_manifest import CHECKPOINT_MANIFEST, latest_checkpoint, read_manifest, require_format
from raytorch.runs.records import CheckpointManifest
from raytorch.runs.status import MonitorHandle
from raytorch.runs.storage import RunFolder, absolute, is_in_job, is_relative, locate
from raytorch.runs.weights_source import find_checkpoint, is_weights_file, with_located_weights

CODE_FOLDER = "code"
"""Copies of the user's own code in a run's folder: one for each step at which it was changed."""


@dataclass(frozen=True)
class RunPlan:
    """A configuration that is ready to run: with its final name and absolute paths."""

    config: RunConfig
    finished: Mapping[str, Any] | None = None
    """The summary of a run that has come to this configuration's end already: nothing is left to do."""
    is_new: bool = True
    """False if it goes on with what is there, of which there may be nothing in the folder of a new run."""
    changed_code: bool = False
    """True if it may go on with other code of the user's own than its latest checkpoint was saved by."""
    new_code_at: int | None = 0
    """The optimizer step from which on the code is this; None if that is recorded already."""

    @property
    def folder(self) -> RunFolder:
        """The run's folder."""
        return RunFolder(self.config.storage, self.config.name)

    def record_code(self) -> None:
        """Copy the user's own code into the run's folder, if it is new, without secrets. It is never run from there."""
        if self.config.code and self.new_code_at is not None:
            place = f"{CODE_FOLDER}/step-{self.new_code_at}"
            self.folder.delete(place)  # of an attempt that has saved nothing
            for file, text in self.config.code.copies().items():
                self.folder.write_text(f"{place}/{file}", text)


@dataclass(frozen=True)
class WorkerJob:
    """All that the driver hands to every worker of a run."""

    plan: RunPlan
    monitor: MonitorHandle


def plan_run(config: RunConfig, name: str | None = None) -> RunPlan:
    """Plan a new run, called ``name`` or by the configuration's name and the time.

    Raises RunExistsError, and ConfigError for what cannot name a folder everywhere, or begins with a run's weights
    that are not there.
    """
    name = checked_name(name) if name is not None else timed_name(config.name)
    plan = RunPlan(placed(config, name, config.storage))
    require_free(plan.folder)
    if (weights := plan.config.model.weights) and not is_weights_file(weights):
        find_checkpoint(weights)  # it may have a later one when the run begins
    return plan


def require_free(folder: RunFolder) -> None:
    """Refuse a folder for a new run in which one has begun. Raises RunExistsError."""
    if folder.exists(CONFIG_FILE) or folder.exists(SUMMARY_FILE) or latest_checkpoint(folder):
        raise RunExistsError(
            f"{folder} exists already; take another name, or resume it",
            remedies=[Remedy("name"), Remedy("resume", str(folder))],
        )


def timed_name(name: str, suffix: str = "") -> str:
    """``name`` with the time, and ``suffix`` where names are made faster than seconds pass."""
    time = f"-{datetime.now():%Y%m%d-%H%M%S}{suffix}"
    return name[: LONGEST_NAME - len(time)] + time


def checked_name(name: str) -> str:
    """``name``, if a run can have it. Raises ConfigError."""
    try:
        return TypeAdapter(RunName).validate_python(name)
    except ValidationError:
        raise ConfigError(f"name {name!r}: must be {NAME_FORM}") from None


def plan_resume(
    run: str, config: RunConfig | None = None, *, storage: str = "runs", changed_code: bool = False
) -> RunPlan:
    """Plan to continue a run from its latest complete checkpoint; one that has saved none yet starts again.

    ``run`` is its name or path, ``config`` a changed configuration in place of its own, and without it ``storage`` is
    where a name is looked for, and the current folder's project where code of the user's own is: a run's folder has a
    copy, which is not run. Raises RunNotFoundError, CheckpointError for a checkpoint of another format, and ConfigError
    where the run's own configuration is unreadable, a key has changed that must not (see
    :mod:`raytorch.config.resuming`), or own code has, unless ``changed_code`` allows for that.
    """
    folder = find_run(run, config.storage if config else storage)
    finished, before = None, recorded_config(folder)
    new_code_at: int | None = 0
    config = placed(config, folder.name, folder.storage) if config else with_own_code(before)
    require_code_elsewhere(config.code, folder)
    latest, source = latest_checkpoint(folder), CONFIG_FILE
    if latest:
        manifest, source = read_manifest(folder, latest), f"{latest}/{CHECKPOINT_MANIFEST}"
        require_format(manifest, folder.file(latest))
        _require_more_to_do(config, manifest, folder.file(source))
        before = _saved_config(manifest, before)
        config = _begun_like(config, before)
        finished = _finished_summary(folder, manifest.step)
        more = (config.epochs, config.steps) != (before.epochs, before.steps) and config.stop == before.stop
        if more and finished and finished.get("ended_early"):
            raise ConfigError(
                f"{folder} ended early ({finished['ended_early']}) and would do so again at once; to go on, give "
                f"{more_to_do(finished)}"
            )
        finished = finished if dump_config(config) == dump_config(before) else None  # in which tuples are lists
        changes = code_changes(config, manifest)
        if changes and not (finished or changed_code):
            masked = masked_copies(config.code, changes) if config.code else ""
            raise ConfigError(
                f"the code of the run that is resumed ({folder.file(source)}) was other than it is: "
                f"{', '.join(changes)}; bring it back, a copy is in {folder.file(CODE_FOLDER)}, or go on with the "
                f"new{masked}",
                remedies=[Remedy("changed_code")],
            )
        new_code_at = manifest.step if changes else None
    refused = [
        f"{key} is {there} in the run that is resumed ({folder.file(source)}) and cannot become {here}: "
        f"{rule_of(key).remark}; give it as it was, or begin a new run"
        for key, there, here in refused_changes(before, config)
    ]
    if refused:
        raise ConfigError("\n".join(refused))
    return RunPlan(config, finished, is_new=False, changed_code=changed_code, new_code_at=new_code_at)


def code_changes(config: RunConfig, manifest: CheckpointManifest) -> list[str]:
    """How the code of the user's own differs from that which a checkpoint was saved by, a sentence for each file."""
    return changed_files(manifest.code, config.code.digests() if config.code else {})


def require_code_elsewhere(code: CodeSnapshot | None, folder: RunFolder) -> None:
    """Refuse code that a run's records name in the run's own folder, of which nothing is run. Raises UserError.

    A folder inside it may be the code's project: that is said by the user, not by the records.
    """
    if code is None or not folder.is_local:
        return
    root, inside = Path(code.root), Path(os.path.realpath(folder.path))
    if root != inside and root.is_relative_to(inside):
        return
    for file in code.sources:
        if Path(os.path.realpath(root / file)).is_relative_to(inside):
            raise UserError(
                f"{folder} names code in its own folder, {file}, of which nothing is run; read it, and move it to "
                "where you keep code of your own"
            )


def more_to_do(summary: Mapping[str, Any]) -> str:
    """What a run that has finished needs to go on."""
    return "stop more patience, or stop: null" if summary.get("ended_early") else "it more epochs or steps"


def _finished_summary(folder: RunFolder, step: int) -> Mapping[str, Any] | None:
    """The summary of a run that has ended well at ``step``; None if it has not."""
    summary = read_summary(folder)
    return summary if (summary["state"], summary.get("step")) == ("finished", step) else None


def _saved_config(manifest: CheckpointManifest, otherwise: RunConfig) -> RunConfig:
    """The configuration that a checkpoint was trained by; its ``config.yaml`` may have been edited since then."""
    try:
        return placed(RunConfig.model_validate(manifest.config), otherwise.name, otherwise.storage)
    except ValidationError:  # of another version of raytorch
        return otherwise


def _begun_like(config: RunConfig, before: RunConfig) -> RunConfig:
    """The configuration with what is read by a run that has no checkpoint yet as it was then."""
    begun = {key: getattr(before.model, key) for key in ("weights", "strict")}
    return config.model_copy(update={"model": config.model.model_copy(update=begun)})


def _require_more_to_do(config: RunConfig, manifest: CheckpointManifest, path: str) -> None:
    if config.loop:  # which may have several passes over data, each of epochs or steps of its own
        return
    for key, wanted, done in (("steps", config.steps, manifest.step), ("epochs", config.epochs, manifest.epoch)):
        if wanted is not None and wanted < done:
            raise ConfigError(
                f"{key} is {wanted:,}, but the run that is resumed has done {done:,g} already ({path}); give at least "
                "as many"
            )


def recorded_config(folder: RunFolder) -> RunConfig:
    """The configuration that a run was started with, under the name and storage of its folder, which may have moved.

    Raises ConfigError if it is unreadable.
    """
    try:
        config = parse(folder.read_bytes(CONFIG_FILE), folder.file(CONFIG_FILE), RunConfig)
    except ConfigError as error:
        raise ConfigError(f"{error}\ncorrect the file to resume the run") from None
    return placed(config, folder.name, folder.storage)


def placed(config: RunConfig, name: str, storage: str) -> RunConfig:
    """``config`` under its final name, with paths that hold whatever folder a worker runs in.

    Raises UserError for data or weights below a submitted job's folder, where none were sent.
    """
    config = with_located_weights(config)
    data, root = config.data, data_root(config.data)
    if root is not None:
        if is_in_job() and is_relative(root):
            raise UserError(
                f"data.root: {root} would be in the job's own folder on the cluster, where data is not sent; give "
                "the folder in full, as all nodes reach it, e.g. data.root=/shared/data"
            )
        data = data.model_copy(update={"root": absolute(root)})
    return config.model_copy(update={"name": name, "storage": locate(storage), "data": data})
