"""A scaling study as a table and as a picture. Imports no torch."""

import io
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Column, Table

from raytorch.storage import RunFolder
from raytorch.terminal import cell
from raytorch.text import shown_line

PICTURE_FILE = "scaling.png"
SHARES = {"compute": "C0", "communication": "C3", "data": "C2"}
"""Where time goes, and its colour in the picture."""


def title(results: Mapping[str, Any]) -> str:
    """What was measured, in a line."""
    return f"{results['name']}, {results['mode']} scaling  ·  {results['device']}, {results['precision']}"


def table(results: Mapping[str, Any]) -> Table:
    """A row for each number of workers, of 80 characters."""
    names = ("workers", "batch", "samples/s", "speed-up", "efficiency", "ms/step", "compute", "comm.", "data")
    drawn = Table(
        *(Column(name, justify="right", no_wrap=True) for name in names),
        title=cell(title(results)),
        caption="comm.: share of time in which a worker waits for the others' gradients",
        box=box.HORIZONTALS,
        padding=(0, 1, 0, 0),
        show_edge=False,
        pad_edge=False,
    )
    for size in results["sizes"]:
        drawn.add_row(
            str(size["workers"]),
            f"{size['batch_size']:,}",
            f"{size['samples_per_s']:,.0f}",
            f"{size['speedup']:.2f}",
            f"{size['efficiency']:.0%}",
            f"{1000 * size['step_s']:.3g}",
            *(f"{size['shares'][share]:.1%}" for share in SHARES),
        )
    return drawn


def write_picture(results: Mapping[str, Any], folder: RunFolder) -> str:
    """Draw samples per second beside the ideal, and the shares of time, into ``scaling.png``; returns its path."""
    from matplotlib.figure import Figure  # takes a second to import

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    figure.suptitle(shown_line(title(results)), parse_math=False)
    rates, shares = figure.subplots(1, 2)
    _draw_rates(rates, results["sizes"])
    _draw_shares(shares, results["sizes"])
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    folder.write_bytes(PICTURE_FILE, content.getvalue())
    return str(folder.file(PICTURE_FILE))


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
        heights = [100 * size["shares"][share] for size in sizes]
        axes.bar(places, heights, bottom=below, width=0.6, color=color, label=share)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    axes.set_title("share of time, %", fontsize=10)
    axes.set_xlabel("workers")
    axes.set_xticks(places, [str(size["workers"]) for size in sizes])
    axes.set_ylim(0, 100)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=len(SHARES), frameon=False)
