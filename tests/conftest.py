"""What tests share: real data, found through RAYTORCH_TEST_DATA, one Ray for the tests of a module, and a small run."""

import gzip
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from whole_runs import SMALL_RUN

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts its background jobs
    signal.signal(signal.SIGINT, signal.default_int_handler)

if "PYTEST_XDIST_WORKER" in os.environ:  # beside others: a thread each for PyTorch, before anything imports it
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# What an embedded Ray leaves out too: it costs every run seconds.
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # as in an embedded Ray: not behind all else that the machine does


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Under ``--dist loadscope``, leave what shares a Ray to one process: the tests of a file, or of a package."""
    from xdist.scheduler import LoadScopeScheduling

    class ByRay(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return str(shares_a_ray(config.rootpath / nodeid.partition("::")[0]))

    return ByRay(config, log) if config.getvalue("dist") == "loadscope" else None


def shares_a_ray(file: Path) -> Path:
    """The package that the tests of a file share a Ray with, or the file itself."""
    return file.parent if (file.parent / "__init__.py").exists() else file


LONGEST = (
    "jobs",
    "own_code",
    "training",
    "session",
    "test_kill",
    "test_kill_ray",
    "sweeps",
    "test_elastic",
    "test_examples",
    "test_session_loss",
    "test_session_conformance",
    "test_hostile_models",
    "test_stateful_metrics",
)
"""Packages and files that take long: begun first, so that all processes are done at about the same time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        name = shares_a_ray(item.path).stem
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=place)


@pytest.fixture(scope="session")
def mnist_archives() -> list[Path]:
    """The real MNIST as it is published: four *-ubyte.gz."""
    default = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
    archives = sorted((Path(os.environ.get("RAYTORCH_TEST_DATA", default)) / "mnist").glob("*-ubyte.gz"))
    if len(archives) != 4:
        pytest.skip("needs MNIST: set RAYTORCH_TEST_DATA to a folder with its four files as mnist/*-ubyte.gz")
    return archives


@pytest.fixture(scope="session")
def mnist_root(tmp_path_factory: pytest.TempPathFactory, mnist_archives: list[Path]) -> Path:
    """A folder with the real MNIST, unpacked as MNIST/raw/*-ubyte."""
    root = tmp_path_factory.mktemp("data")
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for archive in mnist_archives:
        with gzip.open(archive) as packed, (raw / archive.stem).open("wb") as plain:
            shutil.copyfileobj(packed, plain)
    return root


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    from own_ray import own_ray  # here, as unit tests need no ray

    with own_ray(num_cpus=2):
        yield


@pytest.fixture
def small_run(tmp_path: Path) -> dict[str, Any]:
    """SMALL_RUN with a storage of its own."""
    return {**SMALL_RUN, "storage": str(tmp_path / "runs")}


@pytest.fixture
def small_config(small_run: dict[str, Any], tmp_path: Path) -> Path:
    """The small run as a file."""
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(small_run), encoding="utf-8")
    return path
