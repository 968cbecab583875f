"""A scaling study, from its plan to its picture. What is exported is imported when it is first asked for."""

from typing import TYPE_CHECKING

from raytorch.system.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from raytorch.scaling.picture import write_picture
    from raytorch.scaling.study import plan_study, run_study
    from raytorch.scaling.table import results_table

__all__ = ["plan_study", "results_table", "run_study", "write_picture"]

__getattr__ = lazy_exports(
    __name__, {"picture": ["write_picture"], "study": ["plan_study", "run_study"], "table": ["results_table"]}
)
