"""What the pictures of runs and sweeps share."""

from collections.abc import Iterable
from typing import Any, Literal

DECADES = 100.0
"""How many times the smallest value the largest is from which on a linear axis would hide the small ones."""


def scale(axes: Any, direction: Literal["x", "y"], values: Iterable[float]) -> None:
    """Give an axis of matplotlib's a logarithmic scale if ``values`` are above 0 and span two decades or more."""
    values = list(values)
    if values and min(values) > 0 and max(values) >= DECADES * min(values):
        axes.set(**{f"{direction}scale": "log"})
