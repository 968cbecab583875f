"""A sweep, from its file to its picture. What is exported is imported when it is first asked for."""

# ruff: noqa: F403, F405
from typing import TYPE_CHECKING

from raytorch.system.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from raytorch.sweeps.file import *
    from raytorch.sweeps.live_table import *
    from raytorch.sweeps.sweep import *

__all__ = [
    "SweepDisplay",
    "SweepPlan",
    "load_sweep",
    "plan_resumed_sweep",
    "plan_sweep",
    "print_sweep",
    "run_sweep",
]

__getattr__ = lazy_exports(__name__, __all__, "file", "live_table", "sweep")
