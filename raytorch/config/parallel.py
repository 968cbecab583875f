"""How a model is divided among the workers."""

from typing import Literal

from pydantic import PositiveInt

from raytorch.config.execution import Scaling
from raytorch.config.model_keys import NamePattern
from raytorch.config.section import ConflictError, Section

WHOLE_MATRICES = ("muon", "adafactor")
"""Optimizers that compute with all of a matrix."""


class Parallel(Section):
    """What each of several workers has of the model, its gradients and what the optimizer remembers."""

    strategy: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """``ddp`` lets each worker have all of it; ``fsdp`` a share, so that models train that fit on no single worker;
    ``hsdp`` a share within each node, with the same on every node. A single worker has all of it."""
    wrap: list[NamePattern] = []
    """Patterns of names of modules that are gathered one by one while they compute, and hence lie whole on a worker:
    ``["blocks.*"]``. An empty list takes the members of each ``nn.ModuleList`` and ``nn.Sequential`` of which it has
    several of the same class."""
    reshard_after_forward: bool = True
    """Whether such a module is let go of after the forward pass, and gathered again for the backward pass; ``false``
    takes more memory and less communication."""
    tensor: PositiveInt = 1
    """How many workers compute the products of a model together, each with some of the rows or columns of a matrix and
    all with the same samples: of ``gpt``, and of models of your own that have a ``tensor_plan``."""
    shard: PositiveInt | None = None
    """With hsdp, of how many workers each has a share of the model; null takes those of a node."""
    offload: Literal["none", "cpu"] = "none"
    """``cpu`` keeps what a worker with a GPU has of it in the CPU's memory, where the optimizer computes."""


def require_possible(parallel: Parallel, scaling: Scaling, optimizer: str | None, precision: str) -> None:
    """Raise ConflictError for what does not go with sharding; ``optimizer`` is the name of the run's, if it has one."""
    _require_groups(parallel, scaling)
    if parallel.offload != "none":
        _require_offload(parallel, scaling, precision)
    if parallel.strategy != "ddp":
        key, what, instead = "parallel.strategy", f"strategy {parallel.strategy}", "take strategy ddp"
    elif parallel.tensor > 1:
        key, what, instead = "parallel.tensor", "tensor", "leave tensor out"
    else:
        return
    if scaling.gpus_per_worker and scaling.resolved_backend == "gloo":
        raise ConflictError(
            f"{what} needs NCCL on GPUs: gpus_per_worker: 1, and backend nccl or auto; or {instead}",
            key,
            "scaling.gpus_per_worker",
            "scaling.backend",
        )
    if optimizer in WHOLE_MATRICES:
        raise ConflictError(
            f"{optimizer} computes with whole matrices, of which a worker has a share only; take adamw, or "
            f"{instead.removeprefix('take ')}",
            "optimizer.name",
            key,
        )


def _require_groups(parallel: Parallel, scaling: Scaling) -> None:
    """Raise ConflictError for workers that cannot be divided into groups as is asked for."""
    if parallel.shard and parallel.strategy != "hsdp":
        raise ConflictError("shard is for strategy hsdp; leave it out", "parallel.shard", "parallel.strategy")
    for name, size in (("shard", parallel.shard or 1), ("tensor", parallel.tensor)):
        if size > 1 and (scaling.min_workers != scaling.max_workers or scaling.max_workers % size):
            raise ConflictError(
                f"{name} ({size}) must divide the number of workers, which must not change; take another, or leave it "
                "out",
                f"parallel.{name}",
                "scaling.workers",
            )
    if (parallel.shard or parallel.tensor) % parallel.tensor:
        raise ConflictError(
            f"shard ({parallel.shard}) must be a multiple of tensor ({parallel.tensor}), as groups of so many workers "
            "compute products together",
            "parallel.shard",
            "parallel.tensor",
        )


def _require_offload(parallel: Parallel, scaling: Scaling, precision: str) -> None:
    """Raise ConflictError where nothing can be kept in the CPU's memory for a GPU."""
    if parallel.strategy == "ddp":
        raise ConflictError(
            "offload is for strategy fsdp or hsdp; take one of them, or leave it out",
            "parallel.offload",
            "parallel.strategy",
        )
    if not scaling.gpus_per_worker:
        raise ConflictError(
            "without a GPU all is in the CPU's memory already; leave offload out, or set scaling.gpus_per_worker",
            "parallel.offload",
            "scaling.gpus_per_worker",
        )
    if precision == "fp16":
        raise ConflictError(
            "offload does not go with fp16, whose scale is found on the GPU; take precision bf16",
            "parallel.offload",
            "precision",
        )
