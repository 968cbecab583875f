"""A scaling study as a table. Imports no torch."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Column, Table

from raytorch.system.terminal import cell

SHARES = {"compute": "C0", "communication": "C3", "data": "C2"}
"""Where time goes, and its colour in the picture."""


def title(results: Mapping[str, Any]) -> str:
    """Say in a line what was measured."""
    return f"{results['name']}, {results['mode']} scaling  ·  {results['device']}, {results['precision']}"


def results_table(results: Mapping[str, Any]) -> Table:
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
            *("-" if size["shares"][share] is None else f"{size['shares'][share]:.1%}" for share in SHARES),
        )
    return drawn
