"""Training from Python by raytorch's public names alone."""

import json
import subprocess
import sys
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import ray
import torch

import raytorch
from raytorch.datasets import load_dataset as load_data
from raytorch.errors import ConfigError

RUN = {"epochs": 1, "data": "digits", "batch_size": 64, "scaling": {"workers": 1}, "logging": {"tensorboard": False}}


@pytest.mark.usefixtures("local_ray")
def test_train_look_and_resume(tmp_path: Path) -> None:
    """Judged by a share of the training samples, and tested at its end; what a resume does to the bits of such a run is
    in ``tests/unit/test_validation.py``."""
    seen: list[Any] = []
    run = {**RUN, "validation": {"share": 0.1}, "precision": "fp32"}
    result = raytorch.train(run, name="mine", storage=tmp_path, watch=seen.append)
    assert (result.name, result.state, Path(result.path)) == ("mine", "finished", tmp_path / "mine")
    assert seen[-1].evaluations
    assert evaluations(result) == [("validation", 21), ("test", 21)]
    assert result.summary["split"] == "validation"

    test = load_data(raytorch.RunConfig(epochs=1).data, "test", torch.device("cpu"))
    images, digits = test.batch(torch.arange(len(test)))
    with torch.no_grad():
        right = (result.model()(images).argmax(-1) == digits).float().mean().item()
    assert right == pytest.approx(result.test_metrics["accuracy"], abs=1e-3)
    assert result.history()[-1].items() >= result.test_metrics.items()
    assert raytorch.list_runs(tmp_path) == [result]

    written = (tmp_path / "mine" / "summary.json").read_bytes()
    assert raytorch.resume(result, watch=lambda status: pytest.fail("it was run")) == result
    with pytest.raises(ConfigError, match=r"^validation.share is 0.1 in the run that is resumed .* cannot become None"):
        raytorch.resume(result, set={"validation": None})
    assert (tmp_path / "mine" / "summary.json").read_bytes() == written

    longer: list[raytorch.Result] = []  # from a thread, which has no signals
    thread = Thread(target=lambda: longer.append(raytorch.resume(result, set={"epochs": 2})))
    thread.start()
    thread.join()
    assert (longer[0].path, longer[0].summary["epochs"]) == (result.path, 2)
    assert [run.summary["epochs"] for run in raytorch.list_runs(tmp_path)] == [2]
    assert evaluations(longer[0]) == [("validation", 21), ("validation", 42), ("test", 42)]
    assert longer[0].history()[-1].items() >= longer[0].test_metrics.items()
    assert longer[0].summary["split"] == "validation"


def evaluations(result: raytorch.Result) -> list[tuple[str, int]]:
    """Those of a run, as it has written them down."""
    return [(line["split"], line["step"]) for line in result.history() if line["split"] != "train"]


@pytest.mark.usefixtures("local_ray")
def test_a_watcher_stops_a_run(tmp_path: Path) -> None:
    result = raytorch.train({**RUN, "epochs": 1000}, storage=tmp_path, watch=lambda status: bool(status.progress))
    assert (result.state, [run.state for run in raytorch.list_runs(tmp_path)]) == ("stopped", ["stopped"])


HERE_THERE_AND_HERE = """
import json, os, sys
import ray
from raytorch.cluster.joining import joined_ray
before, nodes = dict(os.environ), []
for address in (None, sys.argv[1], None):
    with joined_ray(address):
        host = ray.get(ray.remote(ray.util.get_node_ip_address).remote())
        nodes.append((ray.get_runtime_context().gcs_address, host))
    assert {key: value for key, value in os.environ.items() if before.get(key) != value}.keys() <= {"RAY_CLIENT_MODE"}
print(json.dumps(nodes))
"""


@pytest.mark.usefixtures("local_ray")
def test_a_process_that_has_had_a_ray_of_its_own_joins_a_cluster_and_goes_back() -> None:
    there = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", HERE_THERE_AND_HERE, there]
    first, second, third = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    assert second == [there, ray.util.get_node_ip_address()]
    for own in (first, third):  # which nothing beyond this machine reaches
        assert own[0].split(":")[0] == own[1] == "127.0.0.1"
