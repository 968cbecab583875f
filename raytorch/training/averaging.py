"""A moving average of a model's weights, which may stand in for the newest in what a run evaluates and leaves."""

from collections.abc import Mapping
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from raytorch.config import Averaging
from raytorch.distributed.shards import Stored, own_parts, state_like


class WeightAverage:
    """Keeps the average of a model that is trained, as ``torch.optim.swa_utils.AveragedModel`` does.

    That one counts on the device, and would have it waited for in each step.

    Attributes:
        model: What to evaluate, save and export in its place.
    """

    def __init__(self, trained: nn.Module, config: Averaging) -> None:
        self._trained, self._decay = trained, config.decay
        self.model: nn.Module = deepcopy(trained)
        self._steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights after an optimizer step into account; the first are the average as they are."""
        mean: Any = get_ema_multi_avg_fn
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps)) if self._steps else 0.0
        for averages, newest in self._alike():
            if self._steps:
                mean(decay)(averages, newest, None)
            else:
                for average, new in zip(averages, newest, strict=True):
                    average.copy_(new)
        self._steps += 1

    def _alike(self) -> list[tuple[list[Tensor], list[Tensor]]]:
        """This worker's tensors of both models, those of one type on one device together."""
        alike: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
        pairs = zip(_own_tensors(self.model), _own_tensors(self._trained), strict=True)
        for average, newest in pairs:
            averages, others = alike.setdefault((average.dtype, average.device), ([], []))
            averages.append(average)
            others.append(newest)
        return list(alike.values())

    def state_dict(self) -> dict[str, Any]:
        """What :attr:`model` does not have: the weights that are trained, and how many were averaged."""
        return {"trained": self._trained.state_dict(), "steps": self._steps}

    def load_state_dict(self, saved: Mapping[str, Tensor | Stored], state: Mapping[str, Any]) -> None:
        """Go on from :attr:`model`'s state dict, and :meth:`state_dict`. Raises ValueError for a damaged number."""
        steps = state["steps"]
        if type(steps) is not int or not 0 <= steps < 2**53:
            raise ValueError(f"steps of an average {steps!r:.99}")
        self.model.load_state_dict(state_like(self.model, saved))
        self._steps = steps


def _own_tensors(model: nn.Module) -> list[Tensor]:
    return own_parts(chain(model.parameters(), model.buffers()))
