"""Metrics that keep a state from batch to batch, such as F1 or AUROC, which are no mean: objects like torchmetrics'.

Such an object has ``update``, ``compute`` and ``reset``, and tells its state as ``metric_state``: tensors, and lists of
what each batch brought. The states of several workers are joined here, as torchmetrics' own way has each of them see as
many batches as the others. Imports no torchmetrics.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from raytorch.config import CodeSnapshot, OwnMetric
from raytorch.config.own_calls import imported, makes_a_metric, own_call
from raytorch.errors import ConfigError

States = list[dict[str, Any] | None]
"""The states of a metric and of those in it, on the CPU; None of one that has seen no batch."""


class StatefulMetric:
    """A metric that is updated with one batch after the other.

    Its ``update`` takes the model and a batch if it calls its first parameter ``model``; otherwise, as those of
    torchmetrics do, the outputs and targets of batches that are pairs ``(inputs, targets)``.
    """

    def __init__(self, metric: Any, name: str) -> None:
        """``name`` is for messages. Raises ConfigError if it is no such object."""
        if not all(hasattr(metric, each) for each in ("update", "compute", "reset", "add_state", "metric_state")):
            raise ConfigError(
                f"metrics: {name} makes a {type(metric).__name__}, which is no torchmetrics.Metric; let it make one, "
                "or take the model and a batch and return (sum, count)"
            )
        self._metric, self._name = metric, name
        self._takes_model = any(_first_parameter(part.update) == "model" for part in self._parts())
        for part in self._parts():
            part.distributed_available_fn = lambda: False  # states are joined here

    def to(self, device: torch.device) -> None:
        """Keep its state on ``device`` from now on."""
        if hasattr(self._metric, "to"):
            self._metric.to(device)

    def reset(self) -> None:
        """Forget all batches."""
        self._metric.reset()

    def update(self, model: Callable[..., Any], batch: Any) -> None:
        """Take a batch into account. Raises TypeError for one that is no pair, where it has to be."""
        if self._takes_model:
            self._metric.update(model, batch)
            return
        if not (isinstance(batch, Sequence) and len(batch) == 2):
            raise TypeError(
                f"{self._name} takes outputs and targets, and a batch is no pair (inputs, targets) but "
                f"{type(batch).__name__}; give it an update(self, model, batch) that picks them out"
            )
        outputs, targets = model(batch[0]), batch[1]
        if isinstance(outputs, Tensor) and outputs.is_floating_point():
            outputs = outputs.float()
        with torch.autocast(self._device.type, enabled=False):
            self._metric.update(outputs, targets)

    def states(self) -> States:
        """What it has seen so far."""
        cpu = torch.device("cpu")
        return [_moved(dict(part.metric_state), cpu) if part.update_count else None for part in self._parts()]

    def compute(self, of_all: Sequence[States]) -> float:
        """The metric of all that workers have seen, by their :meth:`states` in the order of ranks.

        To be called where there has been a batch. Raises TypeError if it is not one number.
        """
        for part, states in zip(self._parts(), zip(*of_all, strict=True), strict=True):
            for name, value in _joined(part, [state for state in states if state is not None]).items():
                setattr(part, name, _moved(value, self._device))
        value = self._metric.compute()
        self.reset()
        if not isinstance(value, Tensor | int | float) or (isinstance(value, Tensor) and value.numel() != 1):
            form = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise TypeError(f"{self._name} computed {form}; a metric is one number, as with average: macro")
        return float(value)

    @property
    def _device(self) -> torch.device:
        return torch.device(getattr(self._metric, "device", "cpu"))

    def _parts(self) -> Iterator[Any]:
        """The metric and those that it is made of."""
        modules = self._metric.modules() if hasattr(self._metric, "modules") else [self._metric]
        return (module for module in modules if hasattr(module, "metric_state"))


def own_metric(part: OwnMetric, code: CodeSnapshot | None) -> Callable[..., Any] | StatefulMetric:
    """A metric of the user's own: a function of a model and a batch, or what makes a metric that keeps a state.

    That is a class, or a function of keywords alone. Raises ConfigError.
    """
    named = imported(part.name, code)
    if not makes_a_metric(named):
        return own_call("metrics", part, code)
    return StatefulMetric(own_call("metrics", part, code, named_only=True)(), part.label)


def _first_parameter(function: Callable[..., Any]) -> str | None:
    return next(iter(inspect.signature(function).parameters), None)


def _joined(part: Any, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The state after all batches, of the states of those that have seen some.

    Lists are put in a row, in the order of the data, as a single process would have them. Tensors are reduced as the
    metric's ``add_state`` says.
    """
    if len(states) < 2:
        return dict(states[0]) if states else {}
    joined: dict[str, Any] = {}
    for name, first in states[0].items():
        values = [state[name] for state in states]
        if isinstance(first, Tensor):
            reduce = part._reductions[name]
            stacked = torch.stack(values)
            joined[name] = reduce(stacked) if reduce else stacked
        else:
            joined[name] = [each for value in values for each in value]
    return joined


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(each, device) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_moved(each, device) for each in value)
    return value
