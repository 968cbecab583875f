"""Run a sweep from a script: python jobs/sweep.py configs/sweeps/digits.yaml [KEY=VALUE ...]"""

import sys

from rich.console import Console

from raytorch.service.sweep import plan_sweep, run_sweep
from raytorch.service.sweep_display import SweepDisplay, print_sweep
from raytorch.sweep_file import load_sweep

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    plan = plan_sweep(load_sweep(sys.argv[1], overrides=sys.argv[2:]))
    with SweepDisplay(Console(stderr=True), plan.sweep.trials) as display:
        summary = run_sweep(plan, watch=display)
    print_sweep(Console(), plan.sweep.trials, summary)
