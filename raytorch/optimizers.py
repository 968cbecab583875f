"""Optimizers by the names that configs and sessions use, and their state in checkpoints."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from raytorch.config import Optimizer, ParameterGroup
from raytorch.errors import CheckpointError, ConfigError
from raytorch.system.near_names import did_you_mean

MOST_NAMES = 12
"""Names of parameters that an error lists."""
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
"""Every optimizer by name: PyTorch's own classes."""


def build_optimizer(config: Optimizer, parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """Build the optimizer that ``config`` names of parameters with their names; its fields are the class's arguments.

    The first of its groups are the configuration's, the last has the parameters that none of them names.

    Raises:
        ConfigError: No parameter is left for one of the groups.

    Example:
        >>> from raytorch.config import AdamW
        >>> optimizer = build_optimizer(AdamW(lr=0.01), nn.Linear(2, 2).named_parameters())
    """
    named = dict(parameters)
    groups: list[dict[str, Any]] = []
    for number, group in enumerate(config.groups):
        names = [name for name in named if fnmatchcase(name, group.match)]
        if not names:
            raise ConfigError(
                f"optimizer.groups[{number}].match: no parameter{' that is left' if number else ''} has a name like "
                f"{group.match!r}{did_you_mean(group.match, named)}; there are {', '.join(list(named)[:MOST_NAMES])}"
                f"{', ...' if len(named) > MOST_NAMES else ''}"
            )
        groups.append({"params": [named.pop(name) for name in names], **_settings(group)})
    rest = [{"params": list(named.values())}] if named else []
    return OPTIMIZERS[config.name]([*groups, *rest], **config.model_dump(exclude={"name", "groups"}))


def _settings(group: ParameterGroup) -> dict[str, float]:
    return group.model_dump(exclude={"match"}, exclude_none=True)


def optimizer_state(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Return what ``optimizer`` remembers of each of ``parameters``; its settings are not among it."""
    state, numbers = optimizer.state_dict()["state"], _numbers(optimizer)
    return [state.get(numbers[parameter], {}) for parameter in parameters]


def restore_optimizer(
    optimizer: torch.optim.Optimizer, remembered: list[dict[str, Any]], parameters: Iterable[nn.Parameter]
) -> None:
    """Give ``optimizer``, whose settings stay as they are, what :func:`optimizer_state` took from one like it.

    What only its present settings need (a momentum that was 0, say) begins with zeros. Raises CheckpointError for what
    was taken from another kind of optimizer, or one of other parameters.
    """
    parameters, numbers = list(parameters), _numbers(optimizer)
    if len(remembered) != len(parameters):
        raise CheckpointError(
            f"the checkpoint's optimizer has {len(remembered)} parameters, the model {len(parameters)}; resume with "
            "the model of the run that saved it"
        )
    names = _remembered_names(optimizer)
    pairs = zip(parameters, remembered, strict=True)
    state = {numbers[parameter]: _fitted(parameter, there, names) for parameter, there in pairs if there}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _numbers(optimizer: torch.optim.Optimizer) -> dict[Tensor, int]:
    """The number of each parameter in the optimizer's own state."""
    groups = optimizer.param_groups
    return {parameter: number for number, parameter in enumerate(it for group in groups for it in group["params"])}


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
