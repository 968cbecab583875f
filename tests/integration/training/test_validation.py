"""A run that is judged by a share of its training samples: resumed, and tested at its end."""

from typing import Any

import pytest
from whole_runs import assert_bitwise_equal, weights

import raytorch
from raytorch.errors import ConfigError
from raytorch.runs.storage import RunFolder, split

pytestmark = pytest.mark.usefixtures("local_ray")


def told(result: raytorch.Result) -> list[dict[str, Any]]:
    """The evaluations of a run, as it has written them down."""
    lines = [line for line in result.history() if line["split"] != "train"]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


def test_it_is_the_same_when_it_is_resumed(small_run: dict[str, Any]) -> None:
    run = small_run | {"validation": {"share": 0.1}, "schedule": "constant", "scaling": {"workers": 1}}
    whole = raytorch.train(run, name="whole")
    assert [(line["split"], line["step"]) for line in told(whole)] == [
        *(("validation", step) for step in (21, 42, 63)),
        ("test", 63),
    ]
    assert told(whole)[-1].items() >= whole.test_metrics.items()
    assert whole.summary["split"] == "validation"

    parted = raytorch.train(run | {"epochs": 1}, name="parted")
    assert [(line["split"], line["step"]) for line in told(parted)] == [("validation", 21), ("test", 21)]
    with pytest.raises(ConfigError, match=r"^validation.share is 0.1 in the run that is resumed .* cannot become None"):
        raytorch.resume(parted, set={"validation": None})
    parted = raytorch.resume(parted, set={"epochs": 3})
    assert told(parted) == told(whole)
    assert parted.test_metrics == whole.test_metrics
    folders = [RunFolder(*split(result.path)) for result in (whole, parted)]
    assert_bitwise_equal(*map(weights, folders))
