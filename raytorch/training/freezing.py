"""Parameters that stay as they are while the rest is trained."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from raytorch.errors import ConfigError
from raytorch.training.module_names import derive, matching


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Let the parameters that ``patterns`` name have no gradients, and let parts of no others stay in evaluation mode.

    Raises ConfigError for a pattern that names nothing, and where nothing is left to train.
    """
    if not patterns:
        return
    named = dict(model.named_parameters())
    parts = [f"{name}.*" for name, module in model.named_modules() if name and any(True for _ in module.parameters())]
    for name in matching("model.freeze", patterns, "parameter", named, parts):
        named[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in named.values()):
        raise ConfigError("model.freeze: leaves no parameter to train; name fewer of them")
    for module in model.modules():
        own = list(module.parameters())
        if own and not any(parameter.requires_grad for parameter in own):
            derive(module, train=_stay_in_evaluation)
            module.train()  # which now means no training


def _stay_in_evaluation(train: Callable[..., Any], module: nn.Module, mode: bool = True) -> Any:
    return train(module, False)
