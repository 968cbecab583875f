"""What a loop has registered: its models, their averages, and whatever else a checkpoint keeps."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import nn

from raytorch.config import Averaging, CodeSnapshot, OwnModel, RunConfig
from raytorch.distributed.collectives import broadcast
from raytorch.distributed.ddp import broadcast_buffers, data_parallel
from raytorch.distributed.sharding import reshard, whole
from raytorch.distributed.worker import Worker
from raytorch.errors import ConfigError, UserError
from raytorch.models.networks import Architecture, require_known_inputs
from raytorch.runs.checkpoint_manifest import MODEL_NAME
from raytorch.serialization.llama import require_llama
from raytorch.serialization.nested_state import require_savable
from raytorch.serialization.whole_models import require_loadable
from raytorch.system.near_names import did_you_mean
from raytorch.system.python_files import module_name
from raytorch.training.averaging import WeightAverage
from raytorch.training.checkpoint_files import Models
from raytorch.training.compilation import compiled
from raytorch.training.model_shards import ModelShards
from raytorch.training.precision import Precision
from raytorch.training.run_state import Kept, Restored, Stateful
from raytorch.training.step_log import require_the_same


@dataclass
class Model:
    """A model of a loop."""

    bare: nn.Module
    architecture: Architecture | None
    """What it was built from, if that is known."""
    average: WeightAverage | None = None

    @property
    def shown(self) -> nn.Module:
        """What is evaluated, saved and exported: the average, if there is one."""
        return self.average.model if self.average else self.bare


class Parts:
    """The parts of a loop by name; each is given what the checkpoint has of it as soon as it is registered."""

    def __init__(self, config: RunConfig, worker: Worker, precision: Precision) -> None:
        self._config, self._worker, self._precision = config, worker, precision
        self._shards = ModelShards.of(config, worker, precision)
        self.models: dict[str, Model] = {}
        self.restored: Restored | None = None
        """The checkpoint, until the loop has come to where it was saved."""
        self._kept: dict[str, Stateful] = {}
        self._averaged_at = 0
        self.is_within_batches = False

    def add_model(
        self,
        name: str,
        module: Any,
        arguments: Mapping[str, Any],
        prepare: Callable[[nn.Module], object] | None = None,
    ) -> nn.Module:
        """Put a model on the worker's device, ready to be trained by all workers."""
        self._require_new("run.model", name)
        bare, architecture = self._built(name, module, arguments, prepare)
        if self._config.export and architecture is None:
            raise UserError(
                f"export: model {name} cannot be built again; give run.model its class and the arguments, as "
                f"run.model({name!r}, Net, width=64), or leave export out"
            )
        if architecture:
            require_loadable(bare, architecture)
            if self._config.export:  # before it is trained
                require_known_inputs(bare, architecture)
            if "hf" in self._config.export:
                require_llama(architecture)
        shapes = [tuple(tensor.shape) for tensor in (*bare.parameters(), *bare.buffers())]
        require_the_same(self._worker, f"{name}, with tensors of {shapes}", "run.model")
        if not self._shards:
            bare = self._precision.to_memory_format(bare.to(self._worker.device))
            if prepare:
                prepare(bare)
        else:
            self._shards.divide(name, bare)
        if self.restored:
            self.restored.load_model(name, bare)
        self.models[name] = Model(bare, architecture)
        return bare if self._shards else self._with_gradients_of_all(bare)

    def _built(
        self,
        name: str,
        module: Any,
        arguments: Mapping[str, Any],
        prepare: Callable[[nn.Module], object] | None,
    ) -> tuple[nn.Module, Architecture | None]:
        """A model, and what it can be built from again; one that is to be divided is prepared."""
        if not self._shards:
            return _built(name, module, arguments, self._config.code)

        def build() -> tuple[nn.Module, Architecture | None]:
            bare, architecture = _built(name, module, arguments, self._config.code)
            if prepare:
                prepare(bare)
            return bare, architecture

        return self._shards.built(build, itemgetter(0))

    def _with_gradients_of_all(self, bare: nn.Module) -> nn.Module:
        """The model, whose gradients are averaged over the workers if it has some."""
        # Below DDP, whose own forward pass cannot be traced.
        net = compiled(bare) if self._config.compile else bare
        for tensor in (*bare.parameters(), *bare.buffers()):  # of which DDP has those alone that it trains
            broadcast(tensor.detach())  # a model that is made after the first batches was drawn apart on each worker
        return data_parallel(net) if any(each.requires_grad for each in bare.parameters()) else net

    def add_average(self, name: str, decay: float) -> nn.Module:
        """Keep the moving average of a model's weights, and show it in the model's place."""
        self._require_outside_batches("run.average", name)
        model = self.model(name)
        if model.average:
            raise UserError(f"run.average: {name} has an average already")
        model.average = WeightAverage(model.bare, Averaging(decay=decay))
        if self.restored:
            self.restored.load_average(name, model.average)
        return model.average.model

    def keep(self, name: str, part: Kept, call: str = "run.keep") -> Kept:
        """Save a part with each checkpoint, as ``call`` of the loop asks for."""
        self._require_new(call, name)
        if not (hasattr(part, "state_dict") and hasattr(part, "load_state_dict")):
            raise UserError(
                f"{call}: {name} must have state_dict and load_state_dict, which a {type(part).__name__} lacks"
            )
        try:
            require_savable(part.state_dict())
        except TypeError as error:
            raise TypeError(f"{name}: its state_dict() cannot be saved: {error}") from None
        if self.restored:
            self.restored.load(name, part)
        self._kept[name] = part
        return part

    def model(self, name: str) -> Model:
        """The model of that name. Raises UserError if there is none."""
        if name not in self.models:
            names = ", ".join(self.models) or "none yet"
            raise UserError(f"no model {name} in this run: {names}{did_you_mean(name, self.models)}")
        return self.models[name]

    def skip_averages(self, step: int) -> None:
        """Take no note of an optimizer step."""
        self._averaged_at = step

    def update_averages(self, step: int) -> None:
        """Take the weights after an optimizer step into account, once."""
        if step != self._averaged_at:
            self._averaged_at = step
            if self._shards:
                self._shards.require_alike({name: model.bare for name, model in self.models.items()})
            for model in self.models.values():
                if model.average:
                    model.average.update()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put all models into evaluation mode, with the same buffers on all workers and without gradients."""
        every = {id(net): net for model in self.models.values() for net in (model.bare, model.shown)}.values()
        modes = [(module, module.training) for model in every for module in model.modules()]
        for model in every:
            broadcast_buffers(model)
            model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module, mode in modes:
                module.training = mode
            for model in every:
                reshard(model)

    @property
    def are_sharded(self) -> bool:
        """True if each worker has a part of the models, and of what optimizers remember."""
        return self._shards is not None

    def shown(self) -> Models:
        """The models to save, of which a worker may have its parts alone."""
        for model in self.models.values():
            reshard(model.shown)
        return {name: (model.shown, model.architecture) for name, model in self.models.items()}

    def in_one_piece(self) -> Models:
        """:meth:`shown`, whole on rank 0; where models are divided all workers call it together."""
        return {name: (whole(model), architecture) for name, (model, architecture) in self.shown().items()}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside them, of which a worker may have its parts alone."""
        for model in self.models.values():
            reshard(model.bare)
        averages = {name: model.average.state_dict() for name, model in self.models.items() if model.average}
        return {"kept": {name: part.state_dict() for name, part in self._kept.items()}, "averages": averages}

    @property
    def registered(self) -> list[str]:
        """The names of all."""
        return [*self.models, *self._kept]

    def _require_outside_batches(self, call: str, name: str) -> None:
        if self.is_within_batches:
            raise UserError(f"{call}: register {name} before the batches, where it gets its state after a restart")

    def _require_new(self, call: str, name: str) -> None:
        self._require_outside_batches(call, name)
        if not MODEL_NAME.fullmatch(name):
            raise UserError(
                f"{call}: a name is of up to 64 letters, digits and _, and begins with a letter: not {name!r}"
            )
        if name in self.models or name in self._kept:
            kind = "a model" if name in self.models else "an optimizer or another part"
            raise UserError(
                f"{call}: {name} is registered already, as {kind}; give each model, optimizer and other part of a run "
                f"a name of its own, such as {call.rpartition('.')[2]}_{name}"
            )


def _built(
    name: str, module: Any, arguments: Mapping[str, Any], code: CodeSnapshot | None
) -> tuple[nn.Module, Architecture | None]:
    """A model, and what it can be built from again."""
    if isinstance(module, nn.Module):
        if arguments:
            raise UserError(f"run.model: {name} is a module, which takes no {', '.join(arguments)}; give its class")
        return module, None
    if isinstance(module, Architecture):
        return module.build(), module
    reference = _reference(module, code)
    if reference and (taken := sorted(arguments.keys() & OwnModel.model_fields)):
        raise UserError(
            f"run.model: {name} is given {', '.join(taken)}, a key that raytorch has for models, so that it could not "
            "be built again; rename the parameter, or give the module itself"
        )
    try:
        architecture = Architecture(OwnModel(name=reference, **arguments), code=code) if reference else None
    except ConfigError:
        raise UserError(
            f"run.model: {name} has arguments that JSON has no form for, so that it could not be built again: "
            f"{arguments!r:.200}; give the module itself"
        ) from None
    built = module(**arguments)
    if not isinstance(built, nn.Module):
        raise UserError(f"run.model: {name} must be a torch.nn.Module, or make one, not a {type(built).__name__}")
    return built, architecture


def _reference(function: Callable[..., Any], code: CodeSnapshot | None) -> str | None:
    """``FILE.py:NAME`` of a class or function at the top level of the run's own code; None of any other."""
    module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", ".")
    files = (file for file in (code.sources if code else ()) if module_name(file) == module)
    return next((f"{file}:{name}" for file in files if "." not in name), None)
