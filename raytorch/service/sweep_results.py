"""What a sweep leaves beside its trials: a table, the best configuration, a picture. Imports neither torch nor ray."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raytorch.config import SweepConfig
from raytorch.config_file import dump
from raytorch.pictures import scale
from raytorch.runs import CONFIG_FILE, placed, read_history, read_summary
from raytorch.storage import RunFolder
from raytorch.sweep_file import Trial
from raytorch.text import shown_line

RESULTS_FILE = "results.csv"
BEST_FILE = "best.yaml"
PICTURE_FILE = "sweep.png"
FEW = 10
"""Trials at most that a picture names."""
LONGEST_BASE = 100
"""Characters of the sweep's name that go into the best run's."""


@dataclass(frozen=True)
class Result:
    """What a trial has come to."""

    trial: Trial
    state: str
    """``waiting``, ``running``, ``finished``, ``stopped early``, ``stopped``, ``failed`` or ``lost``."""
    summary: dict[str, Any]
    """The run's ``summary.json``; empty of a trial that has not begun."""
    history: list[dict[str, Any]]
    """The outcomes of its evaluations."""

    @property
    def is_over(self) -> bool:
        """Whether a resumed sweep has nothing to do for it."""
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


def read_result(folder: RunFolder, trial: Trial, stopped_early: bool) -> Result:
    """Read what a trial has come to off its folder.

    Args:
        folder: The sweep's folder.
        trial: Which of its trials.
        stopped_early: Whether it was to be stopped early. One that was quicker has finished; one that was killed before
            it stopped is over all the same.
    """
    place = RunFolder(folder.address, trial.name)
    if not place.exists(CONFIG_FILE):
        return Result(trial, "waiting", {}, [])
    summary = read_summary(place)
    state = "stopped early" if stopped_early and summary["state"] in ("stopped", "lost") else str(summary["state"])
    tests = [line for line in read_history(place) if line["split"] == "test"]
    return Result(trial, state, summary, tests)


def find_best(results: Sequence[Result], metric: str) -> Result | None:
    """The finished trial with the best last evaluation, by the other metric among equals; None if none has finished."""

    def rank(result: Result) -> tuple[float, ...]:
        last = result.history[-1]
        ranks = (last["accuracy"], -last["loss"])
        return ranks if metric == "accuracy" else ranks[::-1]

    finished = [result for result in results if result.state == "finished" and result.history]
    return max(finished, key=rank, default=None)


def write_results(folder: RunFolder, config: SweepConfig, results: Sequence[Result]) -> None:
    """Write the table, the picture, and, if a trial has finished, the best configuration into the sweep's folder."""
    folder.write_text(RESULTS_FILE, table(results))
    folder.write_bytes(PICTURE_FILE, picture(folder.name, config, results))
    best = find_best(results, config.metric)
    if best:
        folder.write_text(BEST_FILE, best_config(folder, config, best))


def table(results: Sequence[Result]) -> str:
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


def best_config(folder: RunFolder, config: SweepConfig, best: Result) -> str:
    """The best trial as a run of its own; on like workers it gives the same numbers again."""
    value = best.history[-1][config.metric]
    run = placed(best.trial.config, f"{config.name[:LONGEST_BASE]}-best", config.storage)
    return f"# {best.trial.name} of the sweep {folder.name}: test {config.metric} {value:.4f}\n{dump(run)}"


def picture(title: str, config: SweepConfig, results: Sequence[Result]) -> bytes:
    """The trials' curves, and where they ended beside each parameter, as PNG."""
    from matplotlib.figure import Figure  # takes a second to import

    varied = [key for key in config.parameters if len({repr(result.trial.parameters[key]) for result in results}) > 1]
    columns = min(3, 1 + len(varied))
    lines = -(-(1 + len(varied)) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.6 * lines), layout="constrained")
    figure.suptitle(shown_line(title), parse_math=False)
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    styles = _styles(results, find_best(results, config.metric))
    _draw_curves(axes[0], config.metric, results, styles)
    for place, key in zip(axes[1:], varied, strict=False):
        _draw_parameter(place, config, key, results, styles)
    for place in axes[1 + len(varied) :]:
        place.set_axis_off()
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()


def _draw_curves(axes: Any, metric: str, results: Sequence[Result], styles: Sequence[dict[str, Any]]) -> None:
    values: list[float] = []
    for result, style in zip(results, styles, strict=True):
        curve = [(line["epoch"], line[metric]) for line in result.history]
        if curve:
            axes.plot(*zip(*curve, strict=True), markersize=3, **style)
            values += (value for _, value in curve)
    scale(axes, "y", values)
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title(f"test {metric}", fontsize=10)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)


def _draw_parameter(
    axes: Any, config: SweepConfig, key: str, results: Sequence[Result], styles: Sequence[dict[str, Any]]
) -> None:
    """Where the trials ended over one parameter; values that are no numbers stand side by side."""
    values = [result.trial.parameters[key] for result in results]
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    names = list(dict.fromkeys(map(str, config.parameters[key].values)))
    ends: list[float] = []
    for result, value, style in zip(results, values, styles, strict=True):
        if result.history:
            ends.append(result.history[-1][config.metric])
            axes.plot(value if numeric else names.index(str(value)), ends[-1], **(style | {"linestyle": ""}))
    scale(axes, "y", ends)
    if config.parameters[key].log_uniform:
        axes.set_xscale("log")
    elif numeric:
        scale(axes, "x", values)
    else:
        axes.set_xticks(range(len(names)), [shown_line(name) for name in names])
        axes.margins(x=0.2)
    axes.set_xlabel(key)
    axes.set_title(f"last test {config.metric}", fontsize=10)
    axes.grid(alpha=0.3)


def _styles(results: Sequence[Result], best: Result | None) -> list[dict[str, Any]]:
    """A colour for each trial; the best one stands out, those that did not finish are crosses on broken lines.

    The legend names the trials where they are few, else the best one alone.
    """
    from matplotlib import colormaps

    few = len(results) <= FEW
    styles: list[dict[str, Any]] = []
    for number, result in enumerate(results):
        color = colormaps["tab10"](number) if few else colormaps["turbo"](number / len(results))
        finished, name = result.state == "finished", result.trial.name
        style: dict[str, Any] = {
            "color": color,
            "marker": "o" if finished else "x",
            "linestyle": "-" if finished else "--",
        }
        style |= {"linewidth": 1.2, "label": name if few else None}
        if result is best:
            style |= {"linewidth": 2.4, "marker": "D", "zorder": 3, "label": f"{name}, the best"}
        styles.append(style)
    return styles
