"""One Ray for all tests here."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from own_ray import collected, own_ray

__all__ = ["collected"]


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
