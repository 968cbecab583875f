"""A Ray of this machine for the tests of a module or a package."""

import gc
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from secrets import token_hex
from typing import Any

import pytest
import ray

from raytorch.cluster.token import needs_token_here

if needs_token_here():  # Ray cannot keep one in this home
    os.environ["RAY_AUTH_TOKEN"] = token_hex(32)


@contextmanager
def own_ray(**options: Any) -> Iterator[Any]:
    """Start a Ray and yield what ``ray.init`` gives; it ends with the context."""
    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"} | options
    yield ray.init("local", **options)
    with rays_leftovers():
        ray.shutdown()


@contextmanager
def rays_leftovers() -> Iterator[None]:
    """Collect what Ray leaves to the garbage collector as it ends: sockets and, in 2.55, processes and files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """End the monitors of runs that have failed, which the frames of what was raised hold."""
    yield
    gc.collect()
