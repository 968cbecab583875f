"""A scaling study, from its plan to its picture."""

from raytorch.scaling.picture import write_picture
from raytorch.scaling.study import plan_study, run_study
from raytorch.scaling.table import table

__all__ = ["plan_study", "run_study", "table", "write_picture"]
