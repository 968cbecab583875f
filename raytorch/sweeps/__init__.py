"""A sweep, from its file to its picture. What is exported is imported when it is first asked for."""

from typing import TYPE_CHECKING

from raytorch.system.lazy_exports import lazy_exports

if TYPE_CHECKING:
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

__getattr__ = lazy_exports(
    __name__,
    {
        "file": ["load_sweep"],
        "live_table": ["SweepDisplay", "print_sweep"],
        "sweep": ["SweepPlan", "plan_resumed_sweep", "plan_sweep", "run_sweep"],
    },
)
