"""What a run does to its model before it is trained, by the keys that every model's section has."""

from collections.abc import Callable

import torch
from torch import nn

from raytorch.config import ModelKeys
from raytorch.training.freezing import freeze
from raytorch.training.initial_weights import begin_with_weights
from raytorch.training.recomputation import recompute


def prepare(model: nn.Module, keys: ModelKeys) -> nn.Module:
    """``model`` itself, with what ``freeze`` and ``checkpointing`` name as they ask for. Before DDP and optimizer.

    Raises ConfigError for a pattern that names nothing, and where nothing is left to train.

    Example:
        >>> model = prepare(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), MlpModel(freeze=["0.*"]))
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['1.weight', '1.bias']
    """
    freeze(model, keys.freeze)
    recompute(model, keys.checkpointing)
    return model


def begin(model: nn.Module, keys: ModelKeys, device: torch.device, tell: Callable[..., None]) -> None:
    """Give the model of a run that has no checkpoint yet the weights that it begins with, and ``tell`` what they are.

    All workers call it together. Raises as :func:`~raytorch.training.initial_weights.begin_with_weights` does.
    """
    if weights := begin_with_weights(model, keys, device):
        tell(initial_weights=weights)
