"""What comes before a run, a sweep and a study alike. Imports neither torch nor ray at its top."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from raytorch.cluster.capacity import require_resources
from raytorch.cluster.joining import joined_ray, prepare_ray, starts_ray
from raytorch.config import RunConfig
from raytorch.datasets.files import check_dataset


@contextmanager
def ray_for(
    configs: Sequence[RunConfig], *, address: str | None = None, module: str, workers_key: str | None = None
) -> Iterator[None]:
    """Join a Ray that can hold each of the runs, while the block runs.

    Args:
        configs: The runs' configurations.
        address: As :func:`raytorch.cluster.joining.joined_ray` takes it.
        module: What drives the runs: it is imported beside the start of Ray, which takes as long.
        workers_key: Where the user sets the number of workers, if not in the configuration.

    Raises:
        UserError: The input has to change: on this machine a data file is missing or corrupt, say.
        ClusterError: As for ``joined_ray``.
        ResourceError: The machine or cluster can never give the CPUs or GPUs that a run asks for.
    """
    if starts_ray(address):
        for data in {repr(config.data): config.data for config in configs}.values():
            check_dataset(data)
    prepare_ray(address)
    importing = threading.Thread(target=import_module, args=[module], daemon=True)
    importing.start()
    with joined_ray(address):
        for config in configs:
            require_resources(config.scaling.min_workers, config.scaling.worker_resources, workers_key=workers_key)
        importing.join()
        yield
