"""Train a run's configuration from a script: python jobs/train.py configs/quickstart.yaml [KEY=VALUE ...]"""

import sys

from rich.console import Console

from raytorch.cli.progress import ProgressDisplay, print_summary
from raytorch.config.file import load
from raytorch.runs.plan import plan_run
from raytorch.training.driver import train

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    plan = plan_run(load(sys.argv[1], overrides=sys.argv[2:]))
    with ProgressDisplay(Console(stderr=True), plan.config.name) as display:
        summary = train(plan, watch=display)
    print_summary(Console(), summary)
