"""A sweep as a picture: the trials' curves, and where they ended beside each parameter."""

from collections.abc import Sequence
from typing import Any

from raytorch.config import SweepConfig
from raytorch.runs.curves import as_png, new_figure, scale
from raytorch.sweeps.results import TrialResult, find_best
from raytorch.system.safe_text import escaped_line

FEW = 10
"""Trials at most that a picture names."""


def picture(title: str, config: SweepConfig, results: Sequence[TrialResult]) -> bytes:
    """The trials' curves, and where they ended beside each parameter, as PNG."""
    varied = [key for key in config.parameters if len({repr(result.trial.parameters[key]) for result in results}) > 1]
    columns = min(3, 1 + len(varied))
    lines = -(-(1 + len(varied)) // columns)
    figure = new_figure(title, 4.6 * columns, 3.6 * lines)
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    metric = config.ranking.label
    styles = _styles(results, find_best(results, metric))
    _draw_curves(axes[0], f"{config.run.judged_split} {metric}", metric, results, styles)
    for place, key in zip(axes[1:], varied, strict=False):
        _draw_parameter(place, config, key, results, styles)
    for place in axes[1 + len(varied) :]:
        place.set_axis_off()
    return as_png(figure)


def _draw_curves(
    axes: Any, title: str, metric: str, results: Sequence[TrialResult], styles: Sequence[dict[str, Any]]
) -> None:
    values: list[float] = []
    for result, style in zip(results, styles, strict=True):
        curve = [(each.epoch, each.metrics[metric]) for each in result.history if metric in each.metrics]
        if curve:
            axes.plot(*zip(*curve, strict=True), markersize=3, **style)
            values += (value for _, value in curve)
    scale(axes, "y", values)
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title(escaped_line(title), fontsize=10, parse_math=False)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)


def _draw_parameter(
    axes: Any, config: SweepConfig, key: str, results: Sequence[TrialResult], styles: Sequence[dict[str, Any]]
) -> None:
    """Where the trials ended over one parameter; values that are no numbers stand side by side."""
    metric = config.ranking.label
    values = [result.trial.parameters[key] for result in results]
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    names = list(dict.fromkeys(map(str, config.parameters[key].values)))
    ends: list[float] = []
    for result, value, style in zip(results, values, styles, strict=True):
        if (end := result.last(metric)) is not None:
            ends.append(end)
            axes.plot(value if numeric else names.index(str(value)), ends[-1], **(style | {"linestyle": ""}))
    scale(axes, "y", ends)
    if config.parameters[key].log_uniform:
        axes.set_xscale("log")
    elif numeric:
        scale(axes, "x", values)
    else:
        axes.set_xticks(range(len(names)), [escaped_line(name) for name in names])
        axes.margins(x=0.2)
    axes.set_xlabel(key)
    axes.set_title(escaped_line(f"last {config.run.judged_split} {metric}"), fontsize=10, parse_math=False)
    axes.grid(alpha=0.3)


def _styles(results: Sequence[TrialResult], best: TrialResult | None) -> list[dict[str, Any]]:
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
