"""A picture of a run's curves."""

from pathlib import Path
from typing import Any

from raytorch.errors import RunNotFoundError, UserError
from raytorch.runs import read_history
from raytorch.storage import RunFolder
from raytorch.text import shown_line


def write_report(folder: RunFolder, out: Path) -> Path:
    """Draw loss, test accuracy, learning rate and samples per second over epochs into a picture.

    Args:
        folder: The run's folder.
        out: The file to write; its ending (.png, .svg, .pdf) decides on the format.

    Raises:
        RunNotFoundError: The run has recorded nothing yet.
        UserError: ``out`` has another ending, or cannot be written.
    """
    history = read_history(folder)
    if not history:
        raise RunNotFoundError(f"{folder} has recorded no metrics yet")
    from matplotlib.figure import Figure  # takes a second to import

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    figure.suptitle(shown_line(folder.name), parse_math=False)
    loss, accuracy, rate, throughput = figure.subplots(2, 2, sharex=True).flat
    _draw(loss, history, {"train": "loss", "test": "loss"}, "loss")
    _draw(accuracy, history, {"test": "accuracy"}, "test accuracy")
    _draw(rate, history, {"train": "lr"}, "learning rate")
    _draw(throughput, history, {"train": "samples_per_s"}, "samples/s")
    for axes in (rate, throughput):
        axes.set_xlabel("epoch")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=120)
    except (OSError, ValueError) as error:  # ValueError: an ending that matplotlib does not know
        raise UserError(f"{out} cannot be written: {error}; give another --out, such as {folder.name}.png") from None
    return out


def _draw(axes: Any, history: list[dict[str, Any]], series: dict[str, str], title: str) -> None:
    """Plot one key of the lines of each split."""
    for split, key in series.items():
        points = [
            (line["epoch"], line[key]) for line in history if line["split"] == split and line.get(key) is not None
        ]
        if points:
            marker, color = ("o", "C1") if split == "test" else ("", "C0")
            axes.plot(*zip(*points, strict=True), marker=marker, markersize=4, color=color, label=split)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    if len(series) > 1:
        axes.legend()
