"""One Ray and one session of two workers for all tests here."""

from collections.abc import Iterator

import pytest
import ray
from own_ray import own_ray

import raytorch
from raytorch.session.session import Session


@pytest.fixture(scope="package")
def cluster() -> Iterator[str]:
    """A Ray for several clients and for two sessions; its address."""
    with own_ray(num_cpus=4):
        yield ray.get_runtime_context().gcs_address


@pytest.fixture(scope="package")
def opened(cluster: str) -> Iterator[Session]:
    """A session that others may join."""
    with raytorch.connect(workers=2, name="shared", timeout_s=60) as session:
        yield session
