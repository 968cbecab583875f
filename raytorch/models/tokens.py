"""Classes of tokens: targets int64 (B, T), and outputs (B, T, classes)."""

from torch import Tensor
from torch.nn import functional as F

IGNORED = -100
"""The target of a token that does not count, such as padding."""


def are_tokens(outputs: Tensor, targets: Tensor) -> bool:
    """Tell whether the outputs are of each token, (B, T, classes)."""
    return outputs.dim() == 3 and not targets.is_floating_point() and targets.shape == outputs.shape[:2]


def token_loss(outputs: Tensor, targets: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """The sum of the cross-entropy of logits (B, T, classes) to targets (B, T), in float32, and how many count."""
    each, of = outputs.float().flatten(0, 1), targets.flatten()
    losses = F.cross_entropy(each, of, reduction="sum", ignore_index=IGNORED, label_smoothing=label_smoothing)
    return losses, (of != IGNORED).sum()
