"""The runs of a storage: finding and listing them, and reading what they came to. Imports neither torch nor ray."""

import logging
from collections import deque
from datetime import datetime
from typing import Any

from raytorch.errors import RecordError, Remedy, RunNotFoundError, UserError
from raytorch.runs.metrics import METRICS_FILE, measured, read_metrics
from raytorch.runs.records import Summary, moment, read_record
from raytorch.runs.status import Evaluation
from raytorch.runs.storage import RunFolder, run_folders, split
from raytorch.system.near_names import did_you_mean
from raytorch.system.processes import Process
from raytorch.system.safe_text import escaped, without_secrets

CONFIG_FILE = "config.yaml"
SUMMARY_FILE = "summary.json"
HEARTBEAT_S = 30.0
"""Seconds between two signs of life of a run's driver in its summary."""
LOST_AFTER_S = 150.0
"""Seconds without one after which a run whose driver cannot be looked for is lost; more than clocks differ."""
LONGEST_HISTORY = 500_000
"""Lines of a run's metrics that are kept in memory, the newest."""

logger = logging.getLogger("raytorch")


def find_run(run: str, storage: str) -> RunFolder:
    """The folder of a run that is given by its name in ``storage`` or by its path. Raises RunNotFoundError."""
    if "/" in run:
        storage, run = split(run)
    if run not in ("", ".", "..") and _is_run(folder := RunFolder(storage, run)):
        return folder
    others = [folder.name for folder in run_folders(storage)]  # tells a bucket that is not there, too
    near = did_you_mean(run, [name for name in others if name != run])  # which may be a study's or a sweep's
    raise RunNotFoundError(
        f"no run {run} in {storage}{near}; give a run that is there",
        remedies=[Remedy("list_runs", without_secrets(storage))],
    )


def list_runs(storage: str) -> list[dict[str, Any]]:
    """The summaries of all runs in a storage, oldest first; the state of a run whose driver is gone is ``lost``.

    A run that cannot be read is warned of, and the others are listed.
    """
    found = []
    for folder in run_folders(storage):
        try:
            if _is_run(folder):
                found.append(read_summary(folder))
        except UserError as error:
            logger.warning("%s", escaped(error))
    return sorted(found, key=lambda summary: str(summary["started"]))


def read_summary(folder: RunFolder) -> dict[str, Any]:
    """A run's summary as it stands; of one that is missing or damaged no more than that the run is ``lost``.

    Its name and path are those of the folder, which may have been moved or copied. A damaged one is warned of.
    """
    place = {"name": folder.name, "path": str(folder)}
    try:
        summary = read_record(folder, SUMMARY_FILE, Summary)
    except (RunNotFoundError, RecordError) as error:
        if isinstance(error, RecordError):
            logger.warning("%s", escaped(error))
        return {**place, "state": "lost", "started": ""}
    if summary.state == "running" and _driver_is_gone(summary):
        summary.state = "lost"
    return place | summary.model_dump(exclude_unset=True) | place


def read_evaluations(folder: RunFolder) -> list[Evaluation]:
    """The evaluations by which a run was judged, as it has written them down."""
    history = read_history(folder)
    split = "validation" if any(line["split"] == "validation" for line in history) else "test"
    lines = [line for line in history if line["split"] == split]
    return [Evaluation(line["step"], line["epoch"], measured(line), split) for line in lines]


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
        logger.warning("%s", escaped(error))
        return []


def _is_run(folder: RunFolder) -> bool:
    """Tell whether a folder is a run's: the record of a submitted script has a summary but no configuration."""
    return folder.exists(CONFIG_FILE) or folder.exists(SUMMARY_FILE)


def _driver_is_gone(summary: Summary) -> bool:
    """True if the process that started a run has ended: known where it can be looked for, else told by its silence."""
    driver = summary.driver
    if driver is not None:
        process = Process(driver.host, driver.pid, driver.began, driver.boot, driver.namespace)
        if (alive := process.is_alive()) is not None:
            return not alive
    if summary.seen is None:
        return False
    silence = datetime.now().astimezone() - moment(summary.seen)
    return silence.total_seconds() > LOST_AFTER_S
