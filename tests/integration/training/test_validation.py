"""A run that is judged by a share of its training samples: resumed, and tested at its end.

That it is the same to the bit as one without a stop is in ``tests/unit/test_validation.py``.
"""

from typing import Any

import pytest

import raytorch
from raytorch.errors import ConfigError

pytestmark = pytest.mark.usefixtures("local_ray")


def told(result: raytorch.Result) -> list[dict[str, Any]]:
    """The evaluations of a run, as it has written them down."""
    lines = [line for line in result.history() if line["split"] != "train"]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


def test_it_is_resumed_and_tested_at_its_end(small_run: dict[str, Any]) -> None:
    run = small_run | {"validation": {"share": 0.1}, "schedule": "constant", "scaling": {"workers": 1}}
    first = raytorch.train(run | {"epochs": 1}, name="first")
    assert [(line["split"], line["step"]) for line in told(first)] == [("validation", 21), ("test", 21)]
    assert told(first)[-1].items() >= first.test_metrics.items()
    assert first.summary["split"] == "validation"
    with pytest.raises(ConfigError, match=r"^validation.share is 0.1 in the run that is resumed .* cannot become None"):
        raytorch.resume(first, set={"validation": None})

    longer = raytorch.resume(first, set={"epochs": 3})
    assert [(line["split"], line["step"]) for line in told(longer)] == [
        *(("validation", step) for step in (21, 42, 63)),
        ("test", 63),
    ]
    assert told(longer)[-1].items() >= longer.test_metrics.items()
    assert longer.summary["split"] == "validation"
