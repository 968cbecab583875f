"""Whether what a run names goes with its data, found out before anything is trained."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from raytorch.config import Loss, RunConfig, TableData
from raytorch.errors import ConfigError
from raytorch.models.networks import Architecture
from raytorch.models.objectives import FOR_NUMBERS

_FOR_CLASSES = ("accuracy",)


def require_fitting(config: RunConfig, facts: Mapping[str, Any]) -> None:
    """Refuse a loss or metric for classes where the data has numbers as targets, and a shipped model learns them.

    Raises ConfigError.
    """
    if "num_targets" not in facts or "num_classes" in facts or ":" in config.model.name:
        return
    named = [f"loss: {config.loss.name}"] if isinstance(config.loss, Loss) and config.loss.name != "mse" else []
    named += [f"metrics: {metric.name}" for metric in config.judged_by if metric.name in _FOR_CLASSES]
    if named:
        is_table = isinstance(config.data, TableData)
        classes = "set data.task: classification" if is_table else "let the data set write them as whole numbers"
        raise ConfigError(
            f"{named[0]} is for classes, and the targets of data {config.data.name} are numbers: {FOR_NUMBERS}; if "
            f"they are classes, {classes}"
        )


def parameters_on(config: RunConfig, facts: Mapping[str, Any]) -> int | None:
    """How many parameters a shipped model has on data with these facts; None of a model of the user's own.

    Raises ConfigError where it cannot be built for them, or does not go with the loss and metrics.
    """
    require_fitting(config, facts)
    if ":" in config.model.name:
        return None
    model: nn.Module = Architecture.of(config.model, facts, None).build(torch.device("meta"))
    return sum(each.numel() for each in model.parameters())
