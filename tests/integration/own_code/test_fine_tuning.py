"""A run that begins with another's weights: frozen, recomputed, averaged and resumed.

That it is the same to the bit as one without a stop, and how it thaws, is in ``tests/unit/test_fine_tuning.py``.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lone_runs import in_place_of_ray
from whole_runs import SMALL_RUN, assert_bitwise_equal, weights

import raytorch
from raytorch.errors import UserError
from raytorch.runs.storage import RunFolder, split

pytestmark = pytest.mark.usefixtures("local_ray")

RUN = SMALL_RUN | {"schedule": "constant", "epochs": 1, "scaling": {"workers": 1}}

PLOTS = """
import torch

def show(model, step, writer, *, lines: int = 1):
    torch.rand(1000)  # the generator of dropout
    with open("told.txt", "a") as file:
        print("\\n".join([f"{step} {type(model).__name__} {writer is not None}"] * lines), file=file)
"""


def folder(result: raytorch.Result) -> RunFolder:
    return RunFolder(*split(result.path))


def test_a_run_is_fine_tuned_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("plots.py").write_text(PLOTS.replace("told.txt", f"{tmp_path}/told.txt"), encoding="utf-8")
    with in_place_of_ray(tmp_path, monkeypatch):
        first = raytorch.train(RUN, name="first")
    model = SMALL_RUN["model"] | {"weights": "first", "freeze": ["1.*"], "checkpointing": ["1", "4"]}
    tuned: dict[str, Any] = RUN | {"model": model, "ema": {"decay": 0.9}, "clip_norm": 1.0}
    shown = tuned | {"on_evaluation": {"name": "plots.py:show", "lines": 2}, "logging": {"every_steps": 2}}
    parted = raytorch.train(shown, name="parted")
    kept = weights(folder(first))
    shutil.rmtree(first.path)  # a resumed run does not ask for it
    resumed = raytorch.resume(parted, set={"epochs": 2})
    frozen = {name: value for name, value in kept.items() if name.startswith("1.")}
    assert_bitwise_equal({name: weights(folder(resumed))[name] for name in frozen}, frozen)
    assert Path("told.txt").read_text(encoding="utf-8").splitlines() == ["24 MLP True"] * 2 + ["48 MLP True"] * 2
    for result in (parted, resumed):
        began = result.summary["initial_weights"]
        assert began["source"] == f"{first.path}/checkpoint_00000024/model.safetensors"
        assert (began["missing"], len(began["sha256"])) == ([], 64)
    assert resumed.model()(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert not torch.equal(weights(folder(resumed))["4.weight"], kept["4.weight"])
    with pytest.raises(UserError, match=r"^model.weights: no run first in .*/runs"):
        raytorch.train(tuned)


def test_weights_that_do_not_fit_end_a_run_before_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"1.weight": torch.zeros(32, 64), "head.bias": torch.zeros(3)}, "some.pt")
    run = RUN | {"model": SMALL_RUN["model"] | {"weights": "some.pt"}}
    with pytest.raises(
        UserError, match=r"^model.weights: .*/some.pt is not of this model: missing: 1.bias, .*, or take what fits"
    ):
        raytorch.train(run)
