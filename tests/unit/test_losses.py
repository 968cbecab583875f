"""The losses are PyTorch's own, so that a config and a session mean the same by a name."""

from typing import get_args

from torch.nn import functional as F

from raytorch.config import Loss
from raytorch.losses import LOSSES


def test_losses_are_pytorchs_own() -> None:
    assert LOSSES["cross_entropy"] is F.cross_entropy
    assert LOSSES["bce"] is F.binary_cross_entropy
    assert LOSSES["bce_with_logits"] is F.binary_cross_entropy_with_logits
    assert LOSSES["mse"] is F.mse_loss


def test_a_config_can_name_every_loss() -> None:
    assert set(get_args(Loss.model_fields["name"].annotation)) == LOSSES.keys()
