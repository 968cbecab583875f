"""A picture of a run's curves."""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from raytorch.config.metrics import RECORD_KEYS
from raytorch.errors import Remedy, RunNotFoundError, UserError, needing_extra
from raytorch.runs.catalog import read_evaluations, read_history
from raytorch.runs.metrics import PACE_KEYS
from raytorch.runs.storage import RunFolder
from raytorch.system.safe_text import escaped_line

PICTURE_FILE = "report.png"
MOST_METRICS = 9
"""Metrics beside the loss that a picture has, and as many numbers that a loop of the user's own logs."""
RATE_PREFIX = "lr_"
"""Beginning of the names under which the rates of a loop's several optimizers are recorded."""
DECADES = 100.0
"""How many times the smallest value the largest is from which on a linear axis would hide the small ones."""


class Panel(NamedTuple):
    """A panel of a picture, and its curves: each of a split's lines and a key of them."""

    title: str
    curves: list[tuple[str, str]]


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
    """Draw the metrics, what a loop has logged, learning rates and samples/s over epochs; answers where the picture is.

    The ending of ``out`` (.png, .svg, .pdf) decides on the format; by default it is ``report.png`` in the run's folder.
    Raises RunNotFoundError if the run has recorded nothing yet, and UserError if ``out`` cannot be written.
    """
    history = read_history(folder)
    panels = [panel for panel in _panels(folder, history) if any(_points(history, *curve) for curve in panel.curves)]
    if not panels:
        raise RunNotFoundError(f"{folder} has recorded no metrics yet")
    rows = -(-len(panels) // 2)
    figure = new_figure(folder.name, 10, 3.25 * rows)
    axes = figure.subplots(rows, 2, sharex=True, squeeze=False).flat
    for place, panel in zip(axes, panels, strict=False):
        _draw(place, history, panel)
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


def _panels(folder: RunFolder, history: list[dict[str, Any]]) -> Iterator[Panel]:
    yield Panel("loss", [(split, "loss") for split in ("train", "validation", "test")])
    yield from _judged_panels(folder)
    logged = list(dict.fromkeys(key for line in history if line["split"] == "train" for key in line))
    rates = [key for key in logged if key == "lr" or key.startswith(RATE_PREFIX)]
    own = [key for key in logged if key not in (*RECORD_KEYS, "loss", *PACE_KEYS, *rates)]
    for key in own[:MOST_METRICS]:
        yield Panel(f"train {key}", [("train", key)])
    yield Panel("learning rate", [("train", key) for key in rates])
    yield Panel("samples/s", [("train", "samples_per_s")])


def _judged_panels(folder: RunFolder) -> Iterator[Panel]:
    """A panel for each of the first metrics, of the split that judges the run, and of its test if that is another."""
    evaluations = read_evaluations(folder)
    names = list(dict.fromkeys(name for line in evaluations for name in line.metrics if name != "loss"))
    splits = dict.fromkeys([line.split for line in evaluations] + ["test"])
    for name in names[:MOST_METRICS]:
        yield Panel(f"test {name}" if len(splits) == 1 else name, [(split, name) for split in splits])


def _points(history: list[dict[str, Any]], split: str, key: str) -> list[tuple[float, float]]:
    return [(line["epoch"], line[key]) for line in history if line["split"] == split and line.get(key) is not None]


def _draw(axes: Any, history: list[dict[str, Any]], panel: Panel) -> None:
    """Plot the panel's curves, on a logarithmic scale where their values span decades."""
    drawn: list[float] = []
    is_of_splits = len({split for split, _ in panel.curves}) > 1
    for number, (split, key) in enumerate(panel.curves):
        if points := _points(history, split, key):
            marker, color = {"train": ("", f"C{number}"), "validation": ("o", "C2"), "test": ("o", "C1")}[split]
            label = split if is_of_splits else escaped_line(key.removeprefix(RATE_PREFIX))
            axes.plot(*zip(*points, strict=True), marker=marker, markersize=4, color=color, label=label)
            drawn += (value for _, value in points)
    scale(axes, "y", drawn)
    axes.set_title(escaped_line(panel.title), fontsize=10, parse_math=False)
    axes.grid(alpha=0.3)
    if len(panel.curves) > 1:
        for text in axes.legend().get_texts():
            text.set_parse_math(False)
