"""The reductions of the collectives, each with what it is of the values of all ranks."""

from collections.abc import Callable

from torch import Tensor

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda all_ranks: all_ranks.sum(0),
    "mean": lambda all_ranks: all_ranks.mean(0),
    "product": lambda all_ranks: all_ranks.prod(0),
    "min": lambda all_ranks: all_ranks.amin(0),
    "max": lambda all_ranks: all_ranks.amax(0),
}
"""Every op, as plain PyTorch computes it from the tensors of all ranks."""
