"""A sweep, from its file to its picture."""

from raytorch.sweeps.file import load_sweep
from raytorch.sweeps.live_table import SweepDisplay, print_sweep
from raytorch.sweeps.sweep import SweepPlan, plan_resumed_sweep, plan_sweep, run_sweep

__all__ = [
    "SweepDisplay",
    "SweepPlan",
    "load_sweep",
    "plan_resumed_sweep",
    "plan_sweep",
    "print_sweep",
    "run_sweep",
]
