"""Names that a saved session may hold: classes and functions of fixed modules, each by a fixed name.

A name is looked up in these tables alone: nothing that a file says is imported, or followed from attribute to
attribute.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler, swa_utils

from raytorch.distributed import data_parallel
from raytorch.layers import LAYERS
from raytorch.models import networks

STATEFUL = (nn.Module, torch.optim.Optimizer, lr_scheduler.LRScheduler)
"""Types whose objects have a state, and are saved."""
_BASES = {*STATEFUL, nn.Container, nn.DataParallel}
"""Classes that are no use by themselves, or take hold of devices."""

MAKERS: dict[str, Callable[..., Any]] = {
    **{
        f"{module.__name__}.{name}": found
        for module in (nn, torch.optim, lr_scheduler, swa_utils)
        for name, found in vars(module).items()
        if isinstance(found, type) and issubclass(found, STATEFUL) and found not in _BASES and name[0] != "_"
    },
    **{f"raytorch.layers.{name}": layer for name, layer in LAYERS.items()},
    **{f"raytorch.models.{name}": build for name, build in networks.MODELS.items()},
    "raytorch.distributed.data_parallel": data_parallel,
}
"""All that an object of a saved session may be made by."""

ACTIVATIONS: dict[str, Callable[..., Any]] = {
    f"torch.nn.functional.{name}": getattr(F, name)
    for name in ("elu", "gelu", "hardtanh", "leaky_relu", "mish", "relu", "selu", "sigmoid", "silu", "softplus", "tanh")
}
"""The functions that an argument may be: those that a transformer's layer takes."""

DTYPES = {str(found).removeprefix("torch."): found for found in vars(torch).values() if isinstance(found, torch.dtype)}
"""PyTorch's dtypes by name."""

_names = {id(found): name for name, found in reversed((MAKERS | ACTIVATIONS).items())}


def name_of(value: Any) -> str | None:
    """The name of a class or function in the tables; None if it has none. Equal is not enough: it is that very one."""
    return _names.get(id(value))
