"""Layers by family, and a table of them by name for configs and sessions."""

from torch import nn

from raytorch.layers import attention, conv, rnn, transformer
from raytorch.layers.attention import *  # noqa: F403
from raytorch.layers.conv import *  # noqa: F403
from raytorch.layers.rnn import *  # noqa: F403
from raytorch.layers.transformer import *  # noqa: F403

LAYERS: dict[str, type[nn.Module]] = {
    name: getattr(family, name) for family in (conv, rnn, attention, transformer) for name in family.__all__
}
"""Every layer by its class name."""

__all__ = ["LAYERS", "attention", "conv", "rnn", "transformer", *LAYERS]
