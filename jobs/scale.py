"""Measure how far a run scales: python jobs/scale.py configs/quickstart.yaml 1,2 [KEY=VALUE ...]"""

import sys
from pathlib import Path

from rich.console import Console

from raytorch.scaling import plan_study, results_table, run_study, write_picture

if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    study = plan_study(Path(sys.argv[1]), map(int, sys.argv[2].split(",")), overrides=sys.argv[3:])
    results = run_study(study)
    console = Console()
    console.print(results_table(results))
    console.print(write_picture(results, study.folder))
