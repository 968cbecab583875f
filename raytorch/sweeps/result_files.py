"""Files that a sweep leaves beside its trials: a table, the best configuration, a picture. Imports no torch."""

import logging
from collections.abc import Sequence

from raytorch.config import SweepConfig
from raytorch.errors import MissingPackageError
from raytorch.runs.storage import RunFolder
from raytorch.sweeps.picture import picture
from raytorch.sweeps.results import TrialResult, best_config, find_best, results_csv

RESULTS_FILE = "results.csv"
BEST_FILE = "best.yaml"
PICTURE_FILE = "sweep.png"

logger = logging.getLogger("raytorch")


def write_results(folder: RunFolder, config: SweepConfig, results: Sequence[TrialResult]) -> None:
    """Write the table, the picture, and, if a trial has finished, the best configuration into the sweep's folder."""
    folder.write_text(RESULTS_FILE, results_csv(results))
    try:
        folder.write_bytes(PICTURE_FILE, picture(folder.name, config, results))
    except MissingPackageError as error:
        logger.warning("there is no picture of the sweep: %s", error)
    best = find_best(results, config.ranking.label)
    if best:
        folder.write_text(BEST_FILE, best_config(folder, config, best))
