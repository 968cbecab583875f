"""Losses by the names that configs and sessions use: PyTorch's own functions."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "bce": F.binary_cross_entropy,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
    "mse": F.mse_loss,
}
"""Every loss by name, with the arguments of the PyTorch function."""
