"""One Ray for all tests here."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
from own_ray import own_ray


@pytest.fixture(scope="package")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where torch.compile puts its code on the workers, which take the environment of the Ray that is started next."""
    folder = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
        yield folder


@pytest.fixture(scope="package")
def local_ray(compiled: Path) -> Iterator[None]:
    with own_ray(num_cpus=2):
        yield


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """End the monitors of runs that have failed, which the frames of what was raised hold."""
    yield
    gc.collect()
