"""A scaling study, from its plan to its picture. What is exported is imported when it is first asked for."""

# ruff: noqa: F403, F405
from typing import TYPE_CHECKING

from raytorch.system.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from raytorch.scaling.picture import *
    from raytorch.scaling.study import *
    from raytorch.scaling.table import *

__all__ = ["plan_study", "results_table", "run_study", "write_picture"]

__getattr__ = lazy_exports(__name__, __all__, "table", "study", "picture")
