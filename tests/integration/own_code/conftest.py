"""One Ray for all tests here."""

from collections.abc import Iterator

import pytest
from own_ray import collected, own_ray

__all__ = ["collected"]


@pytest.fixture(scope="package")
def local_ray() -> Iterator[None]:
    with own_ray(num_cpus=2):
        yield
