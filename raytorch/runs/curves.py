"""A picture of a run's curves."""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from raytorch.errors import Remedy, RunNotFoundError, UserError, needing_extra
from raytorch.runs.catalog import read_evaluations, read_history
from raytorch.runs.storage import RunFolder
from raytorch.system.safe_text import escaped_line

PICTURE_FILE = "report.png"
MOST_METRICS = 9
"""Metrics beside the loss that a picture has."""
DECADES = 100.0
"""How many times the smallest value the largest is from which on a linear axis would hide the small ones."""


def scale(axes: Any, direction: Literal["x", "y"], values: Iterable[float]) -> None:
    """Give an axis of matplotlib's a logarithmic scale if ``values`` are above 0 and span two decades or more."""
    values = list(values)
    if values and min(values) > 0 and max(values) >= DECADES * min(values):
        axes.set(**{f"{direction}scale": "log"})


def new_figure(title: str, width: float, height: float) -> Any:
    """A figure of matplotlib's, in inches. Raises MissingPackageError where there is no matplotlib."""
    with needing_extra("plots"):
        from matplotlib.figure import Figure  # takes a second to import

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(escaped_line(title), parse_math=False)
    return figure


def as_png(figure: Any) -> bytes:
    """The figure as a PNG file."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()


def write_report(folder: RunFolder, out: Path | None = None) -> str:
    """Draw the metrics, learning rate and samples per second over epochs into a picture; answers where it is.

    The ending of ``out`` (.png, .svg, .pdf) decides on the format; by default it is ``report.png`` in the run's folder.
    Raises RunNotFoundError if the run has recorded nothing yet, and UserError if ``out`` cannot be written.
    """
    history = read_history(folder)
    if not history:
        raise RunNotFoundError(f"{folder} has recorded no metrics yet")
    panels: list[tuple[dict[str, str], str]] = [
        ({"train": "loss", "validation": "loss", "test": "loss"}, "loss"),
        *_judged_panels(folder, history),
        ({"train": "lr"}, "learning rate"),
        ({"train": "samples_per_s"}, "samples/s"),
    ]
    rows = -(-len(panels) // 2)
    figure = new_figure(folder.name, 10, 3.25 * rows)
    axes = figure.subplots(rows, 2, sharex=True).flat
    for place, (series, title) in zip(axes, panels, strict=False):
        _draw(place, history, series, title)
    for place in axes[len(panels) :]:
        place.set_axis_off()
    for place in axes[len(panels) - 2 : len(panels)]:
        place.set_xlabel("epoch")
    if out is None:
        folder.write_bytes(PICTURE_FILE, as_png(figure))
        return folder.file(PICTURE_FILE)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=120)
    except (OSError, ValueError) as error:  # ValueError: an ending that matplotlib does not know
        raise UserError(
            f"{out} cannot be written: {error}; give another path, such as {folder.name}.png", remedies=[Remedy("out")]
        ) from None
    return str(out)


def _judged_panels(folder: RunFolder, history: list[dict[str, Any]]) -> Iterator[tuple[dict[str, str], str]]:
    """A panel for each of the first metrics, of the split that judges the run, and of its test if that is another."""
    evaluations = read_evaluations(folder)
    names = list(dict.fromkeys(name for line in evaluations for name in line.metrics if name != "loss"))
    splits = dict.fromkeys([line.split for line in evaluations] + ["test"])
    for name in names[:MOST_METRICS]:
        yield dict.fromkeys(splits, name), f"test {name}" if len(splits) == 1 else name


def _draw(axes: Any, history: list[dict[str, Any]], series: dict[str, str], title: str) -> None:
    """Plot one key of the lines of each split, on a logarithmic scale where its values span decades."""
    drawn: list[float] = []
    for split, key in series.items():
        points = [
            (line["epoch"], line[key]) for line in history if line["split"] == split and line.get(key) is not None
        ]
        if points:
            marker, color = {"train": ("", "C0"), "validation": ("o", "C2"), "test": ("o", "C1")}[split]
            axes.plot(*zip(*points, strict=True), marker=marker, markersize=4, color=color, label=split)
            drawn += (value for _, value in points)
    scale(axes, "y", drawn)
    axes.set_title(escaped_line(title), fontsize=10, parse_math=False)
    axes.grid(alpha=0.3)
    if len(series) > 1:
        axes.legend()
