"""Optimizers by the names that configs and sessions use, and their state in checkpoints."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from raytorch.config import Optimizer
from raytorch.errors import CheckpointError

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
"""Every optimizer by name: PyTorch's own classes."""


def build_optimizer(config: Optimizer, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Build the optimizer that ``config`` names; its other fields are the class's keyword arguments.

    Example:
        >>> from raytorch.config import AdamW
        >>> optimizer = build_optimizer(AdamW(lr=0.01), nn.Linear(2, 2).parameters())
    """
    return OPTIMIZERS[config.name](params, **config.model_dump(exclude={"name"}))


def optimizer_state(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return what ``optimizer`` remembers of each of its parameters, in their order; its settings are not among it."""
    state = optimizer.state_dict()["state"]
    return [state.get(number, {}) for number, _ in enumerate(_parameters(optimizer))]


def restore_optimizer(optimizer: torch.optim.Optimizer, remembered: list[dict[str, Any]]) -> None:
    """Give ``optimizer``, whose settings stay as they are, what :func:`optimizer_state` took from one like it.

    What only its present settings need (a momentum that was 0, say) begins with zeros. Raises CheckpointError for what
    was taken from another kind of optimizer, or one of other parameters.
    """
    parameters = _parameters(optimizer)
    if len(remembered) != len(parameters):
        raise CheckpointError(
            f"the checkpoint's optimizer has {len(remembered)} parameters, the model {len(parameters)}; resume with "
            "the model of the run that saved it"
        )
    names = _remembered_names(optimizer)
    state = {number: _fitted(parameters[number], there, names) for number, there in enumerate(remembered) if there}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _remembered_names(optimizer: torch.optim.Optimizer) -> set[str]:
    """Return what an optimizer of these settings remembers of a parameter, as one that takes a step shows."""
    probe = nn.Parameter(torch.zeros(1))
    probe.grad = torch.zeros(1)
    build: Any = type(optimizer)
    shown = build([probe])
    shown.param_groups[0] |= {name: optimizer.param_groups[0][name] for name in optimizer.defaults}
    shown.step()
    return {name for name, value in shown.state[probe].items() if value is not None}


def _fitted(parameter: Tensor, there: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """The state of one parameter, in its own layout in memory, where an optimizer is faster."""
    if isinstance(there.get("step"), Tensor) != ("step" in names):
        raise CheckpointError("the checkpoint is of another kind of optimizer; resume with the optimizer of its run")
    fitted: dict[str, Any] = {}
    for name in sorted(names):
        value = there.get(name)
        if name == "step" or value is None:
            fitted[name] = torch.zeros_like(parameter) if value is None else value
        elif not isinstance(value, Tensor) or value.shape != parameter.shape:
            raise CheckpointError(f"the checkpoint's {name} does not fit the model; resume with the model of its run")
        else:
            fitted[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    return fitted
