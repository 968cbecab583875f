"""What a user's own function does after each evaluation, for pictures and texts, without a trace in the run."""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from raytorch.config import CodeSnapshot, OwnEvaluation
from raytorch.config.own_calls import own_call
from raytorch.training.reproducibility import generator_states, set_generator_states


class AfterEvaluation:
    """Calls what a run names as ``on_evaluation``. Raises ConfigError if that takes no such arguments."""

    def __init__(self, part: OwnEvaluation, code: CodeSnapshot | None, device: torch.device) -> None:
        self._part, self._code, self._device = part, code, device
        self._function({"step": 0, "epoch": 0.0, "metrics": {}, "writer": None})

    def __call__(self, model: nn.Module, writer: Any, step: int, epoch: float, metrics: Mapping[str, float]) -> None:
        """Call it, within ``run.evaluating()``; random generators are left as they were.

        Args:
            model: The model that was evaluated, not its DDP wrapper: a call of it waits for no other worker.
            writer: TensorBoard's ``SummaryWriter``, or None.
            step: Optimizer steps until now.
            epoch: Passes over the training split until now.
            metrics: What the evaluation came to.
        """
        given = {"step": step, "epoch": epoch, "metrics": dict(metrics), "writer": writer}
        with _keeping_generators(self._device):
            self._function(given)(model)

    def _function(self, given: Mapping[str, Any]) -> Callable[..., Any]:
        return own_call("on_evaluation", self._part, self._code, given, giver="the run")


@contextmanager
def _keeping_generators(device: torch.device) -> Iterator[None]:
    """Random generators are as before when the block ends."""
    drawn, drawn_by_numpy, drawn_by_torch = random.getstate(), np.random.get_state(), generator_states(device)
    try:
        yield
    finally:
        random.setstate(drawn)
        np.random.set_state(drawn_by_numpy)
        set_generator_states(drawn_by_torch, device)
