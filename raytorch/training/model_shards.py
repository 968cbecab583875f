"""Models that are divided among the workers, as the configuration's ``parallel`` says, and how they are made."""

import gc
import logging
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType, ModuleType
from typing import Any, TypeVar

import ray
import torch
from torch import Tensor, nn

from raytorch.config import RunConfig
from raytorch.distributed.collectives import broadcast, gather_objects
from raytorch.distributed.sharding import Sharding, shard
from raytorch.distributed.tensor_parallel import unequal_gradients
from raytorch.distributed.worker import Worker
from raytorch.errors import ConfigError
from raytorch.training.module_names import is_called, matching, repeated, size
from raytorch.training.precision import Precision
from raytorch.training.reproducibility import generator_states, set_generator_states

MOST_NAMES = 8
"""Names of modules that an error lists."""

logger = logging.getLogger("raytorch")
Built = TypeVar("Built")


class ModelShards:
    """Divides the models of a run among its workers.

    Args:
        config: The run's configuration, whose ``parallel`` says how.
        worker: This worker, of several.
        precision: The arithmetic.
    """

    def __init__(self, config: RunConfig, worker: Worker, precision: Precision) -> None:
        self._config, self._worker, self._precision = config, worker, precision
        self._how: Sharding | None = None
        self._is_checked = config.parallel.tensor == 1

    @classmethod
    def of(cls, config: RunConfig, worker: Worker, precision: Precision) -> "ModelShards | None":
        """What divides the models of a run; None where each worker has all of them."""
        is_shared = (config.parallel.strategy != "ddp" or config.parallel.tensor > 1) and worker.world_size > 1
        return cls(config, worker, precision) if is_shared else None

    def built(self, build: Callable[[], Built], model_of: Callable[[Built], nn.Module]) -> Built:
        """What ``build`` makes, which has a model: on rank 0 as it is, on others without memory where that can be.

        All workers have rank 0's generators of random numbers afterwards, as if each had drawn the weights.
        """
        made = self._outlined(build, model_of) if self._worker.rank else None
        made = made or build()
        device = self._worker.device
        drawn = {name: broadcast(state.to(device)).cpu() for name, state in generator_states(device).items()}
        set_generator_states(drawn, device)
        return made

    def _outlined(self, build: Callable[[], Built], model_of: Callable[[Built], nn.Module]) -> Built | None:
        """It without memory; None where its code needs numbers, or it keeps tensors that are no parameter or buffer."""
        states = generator_states(self._worker.device)
        try:
            with torch.device("meta"):
                made = build()
        except Exception as error:  # what is wrong with the code itself is raised when it is called again
            logger.info("a model is built on each worker: %s", error)
            set_generator_states(states, self._worker.device)
            return None
        model = model_of(made)
        registered = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        if any(tensor.is_meta and id(tensor) not in registered for tensor in _tensors_in(model)):
            logger.info("a model is built on each worker, as it has tensors that are neither parameters nor buffers")
            return None
        return made

    def divide(self, name: str, model: nn.Module) -> None:
        """Divide a model, in place. Raises ConfigError if nothing says into what, or it cannot be divided."""
        self._how = self._how or self._sharding()
        products = products_of(model, self._config, name)
        shard(model, gathered_apart(model, self._config, name), self._how, products)

    def require_alike(self, models: Mapping[str, nn.Module]) -> None:
        """Refuse, after the first step, models of which the workers that compute together have other gradients.

        All workers call it together. Raises ConfigError.
        """
        if self._is_checked:
            return
        self._is_checked = True
        for name, model in models.items():
            if unequal := unequal_gradients(model):
                raise ConfigError(
                    f"parallel.tensor: workers that compute together have other gradients of {', '.join(unequal[:3])} "
                    f"of {name}, which each of them has whole; let its tensor_plan say region of the module around "
                    "what computes with a part of it, and let them read and draw the same"
                )

    def _sharding(self) -> Sharding:
        parallel, precision = self._config.parallel, self._precision
        return Sharding(
            groups_of(self._config, self._worker),
            self._worker.device,
            reshard_after_forward=parallel.reshard_after_forward,
            dtype=precision.cast_to,
            autocast=precision.autocast,
            offload=parallel.offload == "cpu",
            compile=self._config.compile,
            tensor=parallel.tensor,
        )


def groups_of(config: RunConfig, worker: Worker) -> tuple[tuple[int, ...], ...]:
    """Ranks of which each group has the whole model: all of them, with hsdp those of a node or as many as are asked
    for, and with ddp those that compute products together.
    """
    ranks, tensor = range(worker.world_size), config.parallel.tensor
    size = tensor if config.parallel.strategy == "ddp" else config.parallel.shard
    if config.parallel.strategy == "fsdp":
        return (tuple(ranks),)
    if size is not None:
        return tuple(tuple(ranks[begin : begin + size]) for begin in range(0, len(ranks), size))
    nodes = gather_objects(ray.get_runtime_context().get_node_id() if ray.is_initialized() else "")
    nodes = [nodes[rank - rank % tensor] for rank in ranks]
    groups = tuple(tuple(rank for rank in ranks if nodes[rank] == node) for node in dict.fromkeys(nodes))
    if len({len(group) for group in groups}) > 1:
        logger.warning(
            "parallel.strategy: hsdp: the nodes have %s workers; models are sharded over all of them, as with fsdp, "
            "since each node would need as many",
            ", ".join(str(len(group)) for group in groups),
        )
        return (tuple(ranks),)
    return groups


# -- what is divided, and what is gathered by itself -------------------------------------------------------------------


def products_of(model: nn.Module, config: RunConfig, name: str) -> dict[str, str]:
    """The names of the modules of a model that workers compute together, with what its ``tensor_plan`` says of them.

    Raises ConfigError where it has none, or one of no such modules.
    """
    if config.parallel.tensor == 1:
        return {}
    plan: Any = getattr(model, "tensor_plan", None)
    if plan is None:
        raise ConfigError(
            f"parallel.tensor: nothing in {name} says which products workers compute together; let its class have a "
            "tensor_plan, or leave parallel.tensor out"
        )
    names = [place for place, _ in model.named_modules() if place]
    return {
        place: kind
        for pattern, kind in plan.items()
        for place in matching(f"parallel.tensor: tensor_plan of {name}", [pattern], "module", names, [])
    }


def gathered_apart(model: nn.Module, config: RunConfig, name: str) -> list[str]:
    """The names of the modules of a model that are gathered one by one: those of ``parallel.wrap``, or repeated ones.

    Repeated are the members of an ``nn.ModuleList`` or ``nn.Sequential`` of which it has several of the same class;
    those inside of them, and those that are small beside the largest, are left. A module that shares a parameter with
    others is not gathered by itself.

    Raises ConfigError where there is none.
    """
    named = {place: module for place, module in model.named_modules() if place}
    modules = [place for place, module in named.items() if is_called(module) and size(module)]
    patterns, chosen = config.parallel.wrap, list[str]()
    if patterns:
        try:
            chosen = _outermost(
                matching("parallel.wrap", patterns, "module", modules, [f"{place}.*" for place in named])
            )
        except ConfigError:
            if not config.loop:  # which may have several models
                raise
    chosen = [place for place in chosen or repeated(model) if _is_alone(model, place)]
    if not chosen and config.parallel.strategy != "ddp":
        places = ", ".join(modules[:MOST_NAMES]) or "none"
        example = next(iter(modules), "blocks.*")
        raise ConfigError(
            f"parallel.wrap: nothing in {name} says into what it is divided, as it has no list of several modules of "
            f"the same class; name its large modules, as parallel.wrap: [{example!r}] (there are {places}"
            f"{', ...' if len(modules) > MOST_NAMES else ''}), or take strategy: ddp"
        )
    return chosen


def _outermost(places: list[str]) -> list[str]:
    return [place for place in places if not any(place.startswith(f"{outer}.") for outer in places)]


def _is_alone(model: nn.Module, place: str) -> bool:
    """Tell whether no other module than this, and those inside of it, has a parameter of its."""
    own = {id(parameter) for parameter in model.get_submodule(place).parameters()}
    named = model.named_parameters(remove_duplicate=False)
    return all(name.startswith(f"{place}.") for name, parameter in named if id(parameter) in own)


def _tensors_in(model: nn.Module) -> Iterable[Tensor]:
    """All tensors that the model holds in any way, but those of modules and classes that it knows."""
    seen: set[int] = set()
    ahead: list[object] = [model]
    while ahead:
        each = ahead.pop()
        if id(each) in seen or isinstance(each, (type, ModuleType)):
            continue
        seen.add(id(each))
        if isinstance(each, Tensor):
            yield each
        elif isinstance(each, FunctionType):
            ahead += [*(each.__closure__ or ()), *(each.__defaults__ or ()), each.__kwdefaults__]
        else:
            ahead += gc.get_referents(each)
