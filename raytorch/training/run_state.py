"""The parts of a loop that a checkpoint has, by name: given back to each as the loop registers it again."""

import logging
from collections.abc import Callable, Container, Mapping
from contextlib import ExitStack
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from raytorch.distributed.shards import remembered_like, state_like
from raytorch.errors import CheckpointError
from raytorch.runs.checkpoint_manifest import RESUME_FROM_ANOTHER, checkpoint_name
from raytorch.runs.storage import RunFolder
from raytorch.serialization.nested_state import in_memory
from raytorch.training.averaging import WeightAverage
from raytorch.training.saved_state import SavedState, explaining_misfit, open_checkpoint

logger = logging.getLogger("raytorch")


class Stateful(Protocol):
    """What can be kept: as optimizers, schedules, gradient scalers and data loaders of PyTorch are."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


Kept = TypeVar("Kept", bound=Stateful)


class OptimizerState:
    """All that a PyTorch optimizer remembers, with its settings, in the form that a checkpoint has."""

    reads_what_it_needs = True
    """Whether :meth:`load_state_dict` reads tensors itself, of which it may need parts alone."""

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
        own = self._optimizer.param_groups
        groups = _with_tuples(state["groups"], own)
        for saved, group in zip(groups, own, strict=True):
            for name, value in group.items():
                is_number = type(value) in (int, float, bool)
                if is_number and type(saved[name]) not in (int, float, bool):
                    raise TypeError(f"{name} of an optimizer is {saved[name]!r:.99}")
        parameters = [parameter for group in own for parameter in group["params"]]
        numbers = [*map(int, state["state"])]
        divided = remembered_like((parameters[number] for number in numbers), state["state"].values())
        remembered = dict(zip(numbers, divided, strict=True))
        self._optimizer.load_state_dict({"state": remembered, "param_groups": groups})
        for group, loaded in zip(own, self._optimizer.param_groups, strict=True):
            group.clear()
            group.update(loaded)
        self._optimizer.param_groups = own  # of which the loop may hold one


def _with_tuples(groups: list[dict[str, Any]], own: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Settings with tuples where the optimizer's ``own`` have them, of which JSON has made lists."""
    return [
        {key: tuple(it) if isinstance(there.get(key), tuple) else it for key, it in group.items()}
        for group, there in zip(groups, own, strict=True)
    ]


def _natural(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise ValueError(f"{number!r:.99} lines")
    return number


class Restored:
    """A checkpoint that a run goes on from, while its loop registers again what it has.

    It stays open until the loop takes its first step after it.

    Args:
        folder: The run's folder.
        step: After how many steps it was saved.
        in_parts: Whether this worker needs parts of it alone.
        may_differ: Whether the code of the loop has changed since.
        may_be_changed: Whether the loop may change what it is given until it comes to its place.

    Attributes:
        lines: How many lines of metrics there were of its step.

    Raises CheckpointError.
    """

    def __init__(
        self,
        folder: RunFolder,
        step: int,
        *,
        in_parts: bool = False,
        may_differ: bool = False,
        may_be_changed: bool = True,
    ) -> None:
        self.name = folder.file(checkpoint_name(step))
        self._may_differ, self._may_be_changed = may_differ, may_be_changed
        self._open = ExitStack()
        opened = open_checkpoint(folder, checkpoint_name(step), in_parts=in_parts)
        self._content: SavedState = self._open.enter_context(opened)
        self.manifest = self._content.manifest
        with explaining_misfit(self.name):
            self.state = self._state()
            self._averaged, self._kept = set(dict(self.state["averages"])), set(dict(self.state["kept"]))
            self._needed = set(map(str, self.state["registered"]))
            self.lines = _natural(self.state["lines"])
        self._models = set(self._content.models)
        self._given: list[Callable[[], object]] = []
        self._is_reached = False

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors that this worker has read of it."""
        return self._content.bytes_read

    def load_model(self, name: str, module: nn.Module) -> None:
        """Give a model its weights: those that are trained, where what is saved is their average."""
        if self._has(name, self._models, f"model {name}"):
            self._models.discard(name)
            self._give(lambda: module.load_state_dict(state_like(module, self._trained(name))))

    def load_average(self, name: str, average: WeightAverage) -> None:
        """Give the average of a model its weights."""
        if name in self._averaged:
            self._averaged.discard(name)
            self._give(lambda: average.load_state_dict(self._content.weights(name), self.state["averages"][name]))
        else:
            logger.warning("%s has no average of %s, which begins with the weights that are there", self.name, name)

    def load(self, name: str, part: Stateful) -> None:
        """Give a part the state that it had."""
        if self._has(name, self._kept, name):
            self._kept.discard(name)
            reads = getattr(part, "reads_what_it_needs", False)
            self._give(lambda: part.load_state_dict((dict if reads else in_memory)(self.state["kept"][name])))

    def reach(self) -> None:
        """Take note that the loop has come to the batches that were saved. Raises CheckpointError for parts that it
        lacks.
        """
        lacked = ", ".join(sorted((self._models | self._kept) & self._needed))
        if lacked and not self._may_differ:
            raise CheckpointError(
                f"{self.name} has {lacked}, which the loop has not registered before its batches; call run.model, "
                "run.optimizer and run.keep with the same names each time"
            )
        for what in (lacked, ", ".join(f"an average of {name}" for name in sorted(self._averaged))):
            if what:
                logger.warning("%s has %s, which the loop has no more", self.name, what)
        self._is_reached = True

    def give_again(self) -> None:
        """Give all parts what they were given, as a loop may have changed them while it came back to its place: by
        initial weights, a step of a schedule, or a schedule that was made since.
        """
        if self._may_be_changed:
            with explaining_misfit(self.name):
                self.state = self._state()
                for give in self._given:
                    give()

    def close(self) -> None:
        """Let go of the files."""
        self._open.close()

    def _give(self, give: Callable[[], object]) -> None:
        with explaining_misfit(self.name):
            give()
        self._given.append(give)

    def _state(self) -> dict[str, Any]:
        """The state that was saved, with tensors of parts and averages that are still to be read."""
        state = self._content.state_to_read()
        return {name: part if name in ("kept", "averages") else in_memory(part) for name, part in state.items()}

    def _trained(self, name: str) -> Mapping[str, Any]:
        trained: Mapping[str, Any] | None = self.state["averages"].get(name, {}).get("trained")
        return self._content.weights(name) if trained is None else trained

    def _has(self, name: str, there: Container[str], called: str) -> bool:
        if self._is_reached:  # what is registered after the batches
            return name in there
        if name not in there and not self._may_differ:
            raise CheckpointError(f"{self.name} has no {called}, though the loop registers it; {RESUME_FROM_ANOTHER}")
        if name not in there:
            logger.warning("%s has no %s, which begins anew", self.name, called)
        return name in there
