"""Run a sweep from a script: python jobs/sweep.py configs/sweeps/digits.yaml [KEY=VALUE ...], or --resume SWEEP"""

import argparse
import os
import shlex

from rich.console import Console

from raytorch.sweeps import SweepDisplay, SweepPlan, load_sweep, plan_resumed_sweep, plan_sweep, print_sweep, run_sweep


def planned() -> SweepPlan:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", help="YAML file of the sweep")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to the file")
    parser.add_argument("--resume", metavar="SWEEP", help="go on with a sweep, by its name or path")
    options = parser.parse_args()
    if bool(options.file) == bool(options.resume):
        parser.error("give either a sweep's file or --resume SWEEP")
    return (
        plan_resumed_sweep(options.resume)
        if options.resume
        else plan_sweep(load_sweep(options.file, options.overrides))
    )


def resuming() -> str:
    """The command that goes on with this sweep: in a submitted job it is to be submitted again."""
    storage = os.environ.get("RAYTORCH_STORAGE_BASE")
    if storage is None:
        return "python jobs/sweep.py --resume"
    return f"raytorch submit jobs/sweep.py --storage {shlex.quote(storage)} -- --resume"


if __name__ == "__main__":
    plan = planned()
    with SweepDisplay(Console(stderr=True), plan.sweep.trials) as display:
        summary = run_sweep(plan, watch=display)
    print_sweep(Console(), plan.sweep.trials, summary, resume=resuming())
