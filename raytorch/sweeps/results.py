"""Results of a sweep's trials, and which is the best. Imports neither torch nor ray."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raytorch.config import SweepConfig
from raytorch.config.file import dump_config
from raytorch.config.metrics import LOSS_LABEL
from raytorch.runs.catalog import CONFIG_FILE, read_evaluations, read_summary
from raytorch.runs.plan import placed
from raytorch.runs.status import Evaluation
from raytorch.runs.storage import RunFolder
from raytorch.sweeps.file import Trial

LONGEST_BASE = 100
"""Characters of the sweep's name that go into the best run's."""


@dataclass(frozen=True)
class TrialResult:
    """Result of a trial."""

    trial: Trial
    state: str
    """``waiting``, ``running``, ``finished``, ``stopped early``, ``stopped``, ``failed`` or ``lost``."""
    summary: dict[str, Any]
    """The run's ``summary.json``; empty of a trial that has not begun."""
    history: list[Evaluation]

    @property
    def is_over(self) -> bool:
        """True if a resumed sweep has nothing to do for it."""
        return self.state in ("finished", "stopped early")

    def last(self, metric: str) -> float | None:
        """The metric's value in the last evaluation, if that has one."""
        return self.history[-1].metrics.get(metric) if self.history else None

    def row(self) -> dict[str, Any]:
        """The trial as JSON tells it."""
        last = self.history[-1] if self.history else None
        tested = self.summary.get("test_metrics")
        row = {
            "trial": self.trial.name,
            "state": self.state,
            "parameters": self.trial.parameters,
            "epoch": last and last.epoch,
            "metrics": last.metrics if last else {},
            "seconds": (self.summary.get("seconds") or {}).get("total"),
            "error": (self.summary.get("error") or {}).get("message") if self.state == "failed" else None,
        }
        return row | ({"test_metrics": tested} if tested else {})


def read_result(folder: RunFolder, trial: Trial, stopped_early: bool) -> TrialResult:
    """Read what a trial has come to off its folder, which is in the sweep's.

    One that was to be stopped early and was quicker has finished; one that was killed before it stopped is over all the
    same.
    """
    place = RunFolder(folder.address, trial.name)
    if not place.exists(CONFIG_FILE):
        return TrialResult(trial, "waiting", {}, [])
    summary = read_summary(place)
    state = "stopped early" if stopped_early and summary["state"] in ("stopped", "lost") else str(summary["state"])
    return TrialResult(trial, state, summary, read_evaluations(place))


def find_best(results: Sequence[TrialResult], metric: str) -> TrialResult | None:
    """The finished trial with the best last evaluation, by the other metrics among equals; None if there is none."""

    def rank(result: TrialResult) -> list[float]:
        run, last = result.trial.config, result.history[-1].metrics
        return [run.ranking_by(name).score(last) for name in dict.fromkeys([metric, *run.metric_names, LOSS_LABEL])]

    finished = [result for result in results if result.state == "finished" and result.last(metric) is not None]
    return max(finished, key=rank, default=None)


def results_csv(results: Sequence[TrialResult]) -> str:
    """The trials as CSV; a run's own key ``loss`` may be a parameter, so the measured one is called ``test_loss``,
    or by another split that judges the trials."""
    metrics = dict.fromkeys(name for result in results for line in result.history[-1:] for name in line.metrics)
    rows = []
    for result in results:
        row = result.row()
        split = result.trial.config.judged_split
        measured = {"epoch": row["epoch"], **{f"{split}_{name}": row["metrics"].get(name) for name in metrics}}
        if split != "test":
            tested = result.summary.get("test_metrics") or {}
            measured |= {f"test_{name}": tested.get(name) for name in metrics}
        names = {"trial": row["trial"], "state": row["state"]}
        rows.append({**names, **row["parameters"], **measured, "seconds": row["seconds"], "error": row["error"]})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def best_config(folder: RunFolder, config: SweepConfig, best: TrialResult) -> str:
    """The best trial as a run of its own; on like workers it gives the same numbers again."""
    metric = config.ranking.label
    value = best.last(metric)
    run = placed(best.trial.config, f"{config.name[:LONGEST_BASE]}-best", config.storage)
    split = best.trial.config.judged_split
    return f"# {best.trial.name} of the sweep {folder.name}: {split} {metric} {value:.4f}\n{dump_config(run)}"
