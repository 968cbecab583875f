"""A scaling study as a picture. Imports no torch."""

from collections.abc import Mapping
from typing import Any

from raytorch.runs.curves import as_png, new_figure
from raytorch.runs.storage import RunFolder
from raytorch.scaling.table import SHARES, title

PICTURE_FILE = "scaling.png"


def write_picture(results: Mapping[str, Any], folder: RunFolder) -> str:
    """Draw samples per second beside the ideal, and the shares of time, into ``scaling.png``; returns its path."""
    figure = new_figure(title(results), 10, 4.2)
    rates, shares = figure.subplots(1, 2)
    _draw_rates(rates, results["sizes"])
    _draw_shares(shares, results["sizes"])
    folder.write_bytes(PICTURE_FILE, as_png(figure))
    return folder.file(PICTURE_FILE)


def _draw_rates(axes: Any, sizes: list[dict[str, Any]]) -> None:
    workers = [size["workers"] for size in sizes]
    rates = [size["samples_per_s"] for size in sizes]
    ideal = [rates[0] * count / workers[0] for count in workers]
    axes.plot(workers, ideal, linestyle="--", color="grey", label="ideal")
    axes.plot(workers, rates, marker="o", color="C0", label="measured")
    for size in sizes:
        axes.annotate(
            f"{size['efficiency']:.0%}",
            (size["workers"], size["samples_per_s"]),
            xytext=(0, -14),
            textcoords="offset points",
            horizontalalignment="center",
        )
    axes.set_title("samples/s, and efficiency", fontsize=10)
    axes.set_xlabel("workers")
    axes.set_xticks(workers)
    axes.set_ylim(0, 1.1 * max(*ideal, *rates))
    axes.margins(x=0.1)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")


def _draw_shares(axes: Any, sizes: list[dict[str, Any]]) -> None:
    places, below = range(len(sizes)), [0.0] * len(sizes)
    for share, color in SHARES.items():
        heights = [100 * (size["shares"][share] or 0.0) for size in sizes]
        axes.bar(places, heights, bottom=below, width=0.6, color=color, label=share)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    axes.set_title("share of time, %", fontsize=10)
    axes.set_xlabel("workers")
    axes.set_xticks(places, [str(size["workers"]) for size in sizes])
    axes.set_ylim(0, 100)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=len(SHARES), frameon=False)
