"""The optimizer's steps on a worker: gradients, their scale and norm, the optimizer, its schedule, and their state."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from raytorch.config import Muon, PlateauSchedule, RunConfig
from raytorch.distributed.shards import clip_gradients, remembered_like
from raytorch.errors import DivergedError
from raytorch.optimizers import build_optimizer, optimizer_state, restore_optimizer
from raytorch.serialization.nested_state import in_memory
from raytorch.training.precision import Precision
from raytorch.training.schedules import build_schedule

LEAST_SCALE = 2.0**-14
"""Of a loss in fp16. GradScaler halves it while gradients overflow, and a loss that is scaled so far down has lost its
small gradients: what overflows even then grows without end."""

logger = logging.getLogger("raytorch")


class OptimizerSteps:
    """Trains a model by gradients that backward passes leave in its parameters.

    All workers take the same steps, as DDP gives all of them the same gradients, an overflow of one worker's too.

    Attributes:
        optimizer: What the configuration names.

    Example:
        >>> steps = OptimizerSteps(config, model, precision, total_steps=100, steps_per_epoch=10)
        >>> steps.zero_grad()
        >>> torch.autograd.backward(steps.scaled(loss))
        >>> is_taken = steps.take()
    """

    reads_what_it_needs = True
    """Whether :meth:`load_state_dict` reads tensors itself, of which it may need parts alone."""

    def __init__(
        self, config: RunConfig, model: nn.Module, precision: Precision, *, total_steps: int, steps_per_epoch: int
    ) -> None:
        """Raises ConfigError: a group has no parameters, or warm-up leaves no step."""
        self._config, self._model = config, model
        self.optimizer = build_optimizer(config.optimizer, model.named_parameters())
        metric = config.schedule.metric if isinstance(config.schedule, PlateauSchedule) else None
        span = {"total_steps": total_steps, "steps_per_epoch": steps_per_epoch}
        self._schedule = build_schedule(config.schedule, self.optimizer, **span, ranking=config.ranking_by(metric))
        self._scaler = precision.loss_scaler()
        self._steps = 0

    @property
    def rate(self) -> float:
        """The learning rate of the next step, of parameters that are in no group of the configuration."""
        return self._schedule.get_last_lr()[-1]

    def zero_grad(self) -> None:
        """Forget the gradients of the step before."""
        self.optimizer.zero_grad(set_to_none=True)

    def scaled(self, loss: Tensor) -> Tensor:
        """What to call ``backward`` on for ``loss``: in fp16 a multiple of it, so that small gradients are not 0."""
        return self._scaler.scale(loss) if self._scaler else loss

    def take(self) -> bool:
        """Take a step by the gradients that are there, which are those of all workers by now.

        Returns False where it was left out, because a gradient has overflowed in fp16: the step counts, and its loss
        may be no number. Raises DivergedError if they do at every scale.
        """
        self._steps += 1
        if self._scaler:
            self._scaler.unscale_(self.optimizer)
        if self._config.clip_norm:
            clip_gradients(self._model.parameters(), self._config.clip_norm)
        if self._scaler:
            is_taken = self._take_if_finite(self._scaler)
        else:
            self.optimizer.step()
            is_taken = True
        self._schedule.step()
        return is_taken

    def _take_if_finite(self, scaler: torch.amp.GradScaler) -> bool:
        before = scaler.get_scale()
        scaler.step(self.optimizer)
        scaler.update()
        scale = scaler.get_scale()
        if scale < LEAST_SCALE:
            raise diverged(self._config, f"gradients overflow in fp16 though the loss is scaled by {scale:.2g}")
        if scale < before:
            logger.info("left out a step, of which a gradient overflowed in fp16; the loss is scaled by %g now", scale)
        return scale >= before

    def after_evaluation(self, metrics: Mapping[str, float]) -> None:
        """Take an evaluation into account, of which all workers have the same numbers."""
        self._schedule.after_evaluation(metrics)

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on beside the model: tensors, and what JSON has."""
        return {
            "optimizer": optimizer_state(self.optimizer, self._model.parameters()),
            "schedule": self._schedule.state_dict(),
            "scaler": self._scaler.state_dict() if self._scaler else {},
            "steps": self._steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave; settings are those of the configuration.

        A checkpoint may have been saved with another schedule or precision. Raises CheckpointError.
        """
        parameters = [*self._model.parameters()]
        restore_optimizer(self.optimizer, remembered_like(parameters, state["optimizer"]), parameters)
        self._steps = int(state["steps"])
        self._schedule.load_state_dict(in_memory(state["schedule"]), self._steps)
        if self._scaler and state["scaler"]:
            self._scaler.load_state_dict(in_memory(state["scaler"]))


def diverged(config: RunConfig, what: str) -> DivergedError:
    """The error that ``what`` is, with what to do about it.

    Example:
        >>> raise diverged(config, "the loss became nan at step 3 of 100")
    """
    optimizer = config.optimizer
    others = f", and optimizer.others.lr, now {optimizer.others.lr:g}" if isinstance(optimizer, Muon) else ""
    groups = ", and that of optimizer.groups" if any(group.lr for group in optimizer.groups) else ""
    precision = "bf16 or fp32" if config.precision == "fp16" else "fp32"
    return DivergedError(
        f"{what}; lower optimizer.lr (now {optimizer.lr:g}{others}{groups}), set clip_norm, add schedule.warmup_steps, "
        f"or try precision: {precision}"
    )
