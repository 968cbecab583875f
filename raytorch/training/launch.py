"""What comes before a run, a sweep and a study alike. Imports neither torch nor ray at its top."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from raytorch.cluster.capacity import require_resources
from raytorch.cluster.joining import joined_ray, prepare_ray, starts_ray
from raytorch.config import ImageData, RunConfig
from raytorch.datasets.files import check_dataset


@contextmanager
def ray_for(
    configs: Sequence[RunConfig], *, address: str | None = None, module: str, workers_key: str | None = None
) -> Iterator[None]:
    """Join a Ray that can hold each of the runs, while the block runs; see :func:`raytorch.cluster.joining.joined_ray`.

    What drives the runs, ``module``, is imported beside the start of Ray, which takes as long. ``workers_key`` is where
    the user sets the number of workers, if not in the configuration. Raises UserError, such as ResourceError for what
    there can never be, and DataError for this machine's files.
    """
    if starts_ray(address):
        for data in {repr(config.data): config.data for config in configs}.values():
            if isinstance(data, ImageData):  # whoever's own are read where they are trained on
                check_dataset(data)
    prepare_ray(address)
    importing = threading.Thread(target=import_module, args=[module], daemon=True)
    importing.start()
    with joined_ray(address):
        for config in configs:
            require_resources(config.scaling.min_workers, config.scaling.worker_resources, workers_key=workers_key)
        importing.join()
        yield
