"""A moving average of a model's weights, which may stand in for the newest in what a run evaluates and leaves."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from raytorch.config import Averaging
from raytorch.distributed.shards import Stored, own_parts, state_like


class WeightAverage:
    """Keeps the average of a model that is trained.

    Attributes:
        model: What to evaluate, save and export in its place.
    """

    def __init__(self, trained: nn.Module, config: Averaging) -> None:
        self._trained, self._decay = trained, config.decay
        self._average = AveragedModel(trained, multi_avg_fn=self._mean, use_buffers=True)
        self.model: nn.Module = self._average.module

    def _mean(self, average: Any, newest: Any, steps: Any) -> None:
        mean: Any = get_ema_multi_avg_fn
        decay = min(self._decay, (1 + int(steps)) / (10 + int(steps)))
        mean(decay)(own_parts(average), own_parts(newest), steps)

    def update(self) -> None:
        """Take the weights after an optimizer step into account; the first are the average as they are."""
        self._average.update_parameters(self._trained)

    def state_dict(self) -> dict[str, Any]:
        """What :attr:`model` does not have: the weights that are trained, and how many were averaged."""
        return {"trained": self._trained.state_dict(), "steps": int(self._average.n_averaged)}

    def load_state_dict(self, saved: Mapping[str, Tensor | Stored], state: Mapping[str, Any]) -> None:
        """Go on from :attr:`model`'s state dict, and :meth:`state_dict`. Raises ValueError for a damaged number."""
        steps = state["steps"]
        if type(steps) is not int or not 0 <= steps < 2**53:
            raise ValueError(f"steps of an average {steps!r:.99}")
        self.model.load_state_dict(state_like(self.model, saved))
        self._average.n_averaged.fill_(steps)
