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
    shard: PositiveInt | None = None
    """With hsdp, of how many workers each has a share of the model; null takes those of a node."""
    offload: Literal["none", "cpu"] = "none"
    """``cpu`` keeps what a worker with a GPU has of it in the CPU's memory, where the optimizer computes."""


def require_possible(parallel: Parallel, scaling: Scaling, optimizer: str | None, precision: str) -> None:
    """Raise ConflictError for what does not go with sharding; ``optimizer`` is the name of the run's, if it has one."""
    is_sharded = parallel.strategy != "ddp"
    if parallel.shard and parallel.strategy != "hsdp":
        raise ConflictError("shard is for strategy hsdp; leave it out", "parallel.shard", "parallel.strategy")
    if parallel.shard and (scaling.min_workers != scaling.max_workers or scaling.max_workers % parallel.shard):
        raise ConflictError(
            f"shard ({parallel.shard}) must divide the number of workers, which must not change; take another, or "
            "leave it out",
            "parallel.shard",
            "scaling.workers",
        )
    if parallel.offload != "none" and not is_sharded:
        raise ConflictError(
            "offload is for strategy fsdp or hsdp; take one of them, or leave it out",
            "parallel.offload",
            "parallel.strategy",
        )
    if parallel.offload != "none" and not scaling.gpus_per_worker:
        raise ConflictError(
            "without a GPU all is in the CPU's memory already; leave offload out, or set scaling.gpus_per_worker",
            "parallel.offload",
            "scaling.gpus_per_worker",
        )
    if parallel.offload != "none" and precision == "fp16":
        raise ConflictError(
            "offload does not go with fp16, whose scale is found on the GPU; take precision bf16",
            "parallel.offload",
            "precision",
        )
    if is_sharded and scaling.gpus_per_worker and scaling.resolved_backend == "gloo":
        raise ConflictError(
            f"strategy {parallel.strategy} needs NCCL on GPUs: gpus_per_worker: 1, and backend nccl or auto; or take "
            "strategy ddp",
            "parallel.strategy",
            "scaling.gpus_per_worker",
            "scaling.backend",
        )
    if is_sharded and optimizer in WHOLE_MATRICES:
        raise ConflictError(
            f"{optimizer} computes with whole matrices, of which a worker has a share only; take adamw, or strategy "
            "ddp",
            "optimizer.name",
            "parallel.strategy",
        )
