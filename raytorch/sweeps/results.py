"""Results of a sweep's trials, and which is the best. Imports neither torch nor ray."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raytorch.config import SweepConfig
from raytorch.config.file import dump_config
from raytorch.runs.catalog import CONFIG_FILE, read_history, read_summary
from raytorch.runs.plan import placed
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
    history: list[dict[str, Any]]
    """The outcomes of its evaluations."""

    @property
    def is_over(self) -> bool:
        """True if a resumed sweep has nothing to do for it."""
        return self.state in ("finished", "stopped early")

    def row(self) -> dict[str, Any]:
        """The trial as JSON tells it."""
        last = self.history[-1] if self.history else {}
        return {
            "trial": self.trial.name,
            "state": self.state,
            "parameters": self.trial.parameters,
            **{key: last.get(key) for key in ("epoch", "accuracy", "loss")},
            "seconds": (self.summary.get("seconds") or {}).get("total"),
            "error": (self.summary.get("error") or {}).get("message") if self.state == "failed" else None,
        }


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
    tests = [line for line in read_history(place) if line["split"] == "test"]
    return TrialResult(trial, state, summary, tests)


def find_best(results: Sequence[TrialResult], metric: str) -> TrialResult | None:
    """The finished trial with the best last evaluation, by the other metric among equals; None if none has finished."""

    def rank(result: TrialResult) -> tuple[float, ...]:
        last = result.history[-1]
        ranks = (last["accuracy"], -last["loss"])
        return ranks if metric == "accuracy" else ranks[::-1]

    finished = [result for result in results if result.state == "finished" and result.history]
    return max(finished, key=rank, default=None)


def results_csv(results: Sequence[TrialResult]) -> str:
    """The trials as CSV; a run's own key ``loss`` may be a parameter, so the measured one is called ``test_loss``."""
    rows = []
    for result in results:
        row = result.row()
        measured = {"epoch": row["epoch"], "test_accuracy": row["accuracy"], "test_loss": row["loss"]}
        names = {"trial": row["trial"], "state": row["state"]}
        rows.append({**names, **row["parameters"], **measured, "seconds": row["seconds"], "error": row["error"]})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def best_config(folder: RunFolder, config: SweepConfig, best: TrialResult) -> str:
    """The best trial as a run of its own; on like workers it gives the same numbers again."""
    value = best.history[-1][config.metric]
    run = placed(best.trial.config, f"{config.name[:LONGEST_BASE]}-best", config.storage)
    return f"# {best.trial.name} of the sweep {folder.name}: test {config.metric} {value:.4f}\n{dump_config(run)}"
