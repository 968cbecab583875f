"""The parts of a loop that a checkpoint has, by name: given back to each as the loop registers it again."""

import logging
from collections.abc import Container
from contextlib import ExitStack
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from raytorch.errors import CheckpointError
from raytorch.runs.checkpoint_manifest import RESUME_FROM_ANOTHER, checkpoint_name
from raytorch.runs.storage import RunFolder
from raytorch.training.checkpoints import SavedState, explaining_misfit, open_checkpoint

logger = logging.getLogger("raytorch")


class Stateful(Protocol):
    """What can be kept: as optimizers, schedules, gradient scalers and data loaders of PyTorch are."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


Kept = TypeVar("Kept", bound=Stateful)


class OptimizerState:
    """All that a PyTorch optimizer remembers, with its settings, in the form that a checkpoint has."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """Nested dictionaries and lists of tensors and plain values."""
        state = self._optimizer.state_dict()
        return {
            "state": {str(number): each for number, each in state["state"].items()},
            "groups": state["param_groups"],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        groups = [each | {"betas": tuple(each["betas"])} if "betas" in each else each for each in state["groups"]]
        remembered = {int(number): each for number, each in state["state"].items()}
        self._optimizer.load_state_dict({"state": remembered, "param_groups": groups})


class Restored:
    """A checkpoint that a run goes on from, while its loop registers again what it has.

    It stays open until the loop has come to the batches among which it was saved.
    """

    def __init__(self, folder: RunFolder, step: int, device: torch.device, *, may_differ: bool = False) -> None:
        """That after so many steps; ``may_differ`` of a loop whose code has changed. Raises CheckpointError."""
        self.name = folder.file(checkpoint_name(step))
        self._device, self._may_differ = device, may_differ
        self._open = ExitStack()
        self._content: SavedState = self._open.enter_context(open_checkpoint(folder, checkpoint_name(step)))
        self.manifest = self._content.manifest
        with explaining_misfit(self.name):
            self.state = self._content.state()
            self.averages: dict[str, Any] = dict(self.state["averages"])
            self._kept: dict[str, Any] = dict(self.state["kept"])
        self._models = set(self._content.models)

    def load_model(self, name: str, module: nn.Module) -> None:
        """Give a model its weights: those that are trained, where what is saved is their average."""
        if self._has(name, self._models, f"model {name}"):
            self._models.discard(name)
            with explaining_misfit(self.name):
                trained = self.averages.get(name, {}).get("trained")
                module.load_state_dict(self.weights(name) if trained is None else trained)

    def weights(self, name: str) -> dict[str, Tensor]:
        """The weights of a model as they are in its file."""
        return self._content.model(self._device, name)

    def load(self, name: str, part: Stateful) -> None:
        """Give a part the state that it had."""
        if self._has(name, self._kept, name):
            with explaining_misfit(self.name):
                part.load_state_dict(self._kept.pop(name))

    def close(self) -> None:
        """Let go of the files. Raises CheckpointError for parts that the loop has not registered."""
        self._open.close()
        left = ", ".join(sorted({*self._models, *self._kept}))
        if left and not self._may_differ:
            raise CheckpointError(
                f"{self.name} has {left}, which the loop has not registered before its batches; call run.model, "
                "run.optimizer and run.keep with the same names each time"
            )
        if left:
            logger.warning("%s has %s, which the loop has no more", self.name, left)

    def _has(self, name: str, there: Container[str], called: str) -> bool:
        if name not in there and not self._may_differ:
            raise CheckpointError(f"{self.name} has no {called}, though the loop registers it; {RESUME_FROM_ANOTHER}")
        if name not in there:
            logger.warning("%s has no %s, which begins anew", self.name, called)
        return name in there
