"""How a run is carried out: its workers, checkpoints, early end, average of weights, recovery and records."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, NonNegativeFloat, PositiveFloat, PositiveInt, Tag, model_validator

from raytorch.config.section import ConflictError, Section


class WorkerRange(Section):
    """How few and how many workers an elastic run may have."""

    min: PositiveInt
    """Fewest workers to go on with."""
    max: PositiveInt
    """Most workers to use when the cluster has room."""

    @model_validator(mode="after")
    def _ordered(self) -> "WorkerRange":
        if self.min > self.max:
            raise ConflictError(f"min ({self.min}) must not exceed max ({self.max})", "min", "max")
        return self


def _workers_kind(value: Any) -> str:
    """Choose by form, so that a mistake is reported against the form that was meant."""
    return "range" if isinstance(value, dict | WorkerRange) else "number"


class Scaling(Section):
    """How many workers, and what each of them holds."""

    workers: Annotated[
        Annotated[PositiveInt, Tag("number")] | Annotated[WorkerRange, Tag("range")], Discriminator(_workers_kind)
    ] = 1
    """Worker processes; ``{min: 1, max: 4}`` makes the run elastic."""
    cpus_per_worker: PositiveFloat = 1
    """CPU cores reserved for each worker, and its number of threads."""
    gpus_per_worker: Annotated[float, Field(ge=0, le=1)] = 0
    """GPUs for each worker: 0 trains on CPUs, a fraction shares one GPU."""
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Collective communication: auto takes NCCL where each worker holds a GPU of its own, else gloo."""
    timeout_s: PositiveInt = 1800
    """Seconds after which a collective operation that makes no progress fails."""

    @property
    def worker_resources(self) -> dict[str, float]:
        """Resources that each worker holds, by Ray's names."""
        return {"CPU": self.cpus_per_worker, **({"GPU": self.gpus_per_worker} if self.gpus_per_worker else {})}

    @property
    def min_workers(self) -> int:
        """Fewest workers that the run may have."""
        return self.workers.min if isinstance(self.workers, WorkerRange) else self.workers

    @property
    def max_workers(self) -> int:
        """Most workers that the run may have."""
        return self.workers.max if isinstance(self.workers, WorkerRange) else self.workers

    @property
    def resolved_backend(self) -> Literal["nccl", "gloo"]:
        """The backend that ``auto`` stands for."""
        if self.backend != "auto":
            return self.backend
        return "nccl" if self.gpus_per_worker == 1 else "gloo"

    @model_validator(mode="after")
    def _backend_fits_devices(self) -> "Scaling":
        if self.backend == "nccl" and self.gpus_per_worker < 1:
            raise ConflictError(
                "backend nccl needs gpus_per_worker: 1 (a GPU of its own for each worker); use gloo or auto",
                "backend",
                "gpus_per_worker",
            )
        return self


class Checkpointing(Section):
    """When the run's state is saved, and what is kept."""

    every_epochs: PositiveInt | None = 1
    """Epochs between two checkpoints; null saves only by steps. The end of a run always saves."""
    every_steps: PositiveInt | None = None
    """Optimizer steps between two checkpoints within an epoch; null saves only by epochs."""
    keep: PositiveInt = 2
    """Checkpoints to keep: the best, and always the latest."""
    background: bool = True
    """Whether training goes on while a checkpoint is written, for which the weights and what the optimizer remembers
    are copied into this host's memory first; ``false`` saves that memory, and the training waits."""
    when_busy: Literal["wait", "skip"] = "wait"
    """When a checkpoint is due while the one before is still being written: ``wait`` for that, or ``skip`` the new
    one. The last one of a run is never skipped."""
    best_by: str | None = None
    """Metric of the run, or ``loss``, by which checkpoints are ranked, by its value on the test split, or on
    ``validation`` if there is one; null takes the first metric, or the loss of a run that has none. Checkpoints within
    an epoch rank below all evaluated ones."""


class EarlyStopping(Section):
    """When a run ends before its last epoch or step, as it no longer gets better."""

    metric: str | None = None
    """Metric of the run, or ``loss``, that has to get better on the test split, or on ``validation`` if there is one;
    null takes the first metric, or the loss of a run that has none."""
    patience: PositiveInt
    """Evaluations in a row without a better one after which the run ends; there is one after each epoch."""
    min_change: NonNegativeFloat = 0.0
    """By how much the metric has to be better than the best so far to count."""


class Averaging(Section):
    """An exponential moving average of weights and buffers, which is evaluated, saved and exported in their place."""

    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """Share of the average that a step leaves, the rest is of the newest weights. The first step's are the average, and
    the n-th step after it leaves at most (1 + n) / (10 + n), so that they are soon forgotten."""


class Failure(Section):
    """Settings for when a worker is lost."""

    max_restarts: Annotated[int, Field(ge=-1)] = 3
    """Restarts from the latest checkpoint after lost workers; -1 for no limit. Errors in code are not retried."""


class Logging(Section):
    """Settings for what a run records while it trains."""

    every_steps: PositiveInt = 20
    """Optimizer steps between two lines of metrics; the loss is reduced over all workers at each."""
    tensorboard: bool = True
    """Write TensorBoard events into the run's folder."""
