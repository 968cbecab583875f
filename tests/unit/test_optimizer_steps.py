"""Steps of an optimizer with their scale, norm, schedule and state, against plain PyTorch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from saved_states import load_saved_state, save_state
from torch import Tensor, nn
from torch.nn import functional as F

from raytorch.config import RunConfig
from raytorch.config.file import from_data
from raytorch.errors import ConfigError, DivergedError
from raytorch.training.optimizer_steps import LEAST_SCALE, OptimizerSteps
from raytorch.training.precision import Precision

CPU = torch.device("cpu")
STEPS = 12


def config_of(**changes: Any) -> RunConfig:
    return from_data({"steps": STEPS, "optimizer": {"name": "adamw", "lr": 0.02}} | changes)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def loss_of(model: nn.Module, step: int, precision: Precision) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    inputs, targets = torch.randn(5, 6, generator=generator), torch.randint(3, (5,), generator=generator)
    with precision.autocast():
        return F.cross_entropy(model(inputs), targets)


class Part:
    """A model in training, as a run has it."""

    def __init__(self, config: RunConfig) -> None:
        self.model, self.precision = net(), Precision.choose(config.precision, CPU)
        self.steps = OptimizerSteps(config, self.model, self.precision, total_steps=STEPS, steps_per_epoch=4)
        self.done = 0
        self.taken: list[bool] = []

    def train(self, count: int, spoil: tuple[int, ...] = ()) -> "Part":
        """Take steps, with an evaluation after every second; ``spoil`` are those of which a gradient overflows."""
        for _ in range(count):
            self.steps.zero_grad()
            torch.autograd.backward(self.steps.scaled(loss_of(self.model, self.done, self.precision)))
            if self.done in spoil:
                next(self.model.parameters()).grad[0, 0] = torch.inf  # type: ignore[index]
            self.taken.append(self.steps.take())
            self.done += 1
            if self.done % 2 == 0:
                self.steps.after_evaluation({"accuracy": 0.5, "loss": 1.0})
        return self

    def saved(self, folder: Path) -> dict[str, Any]:
        save_state(self.steps.state_dict(), folder)
        return load_saved_state(folder)

    def resumed(self, config: RunConfig, folder: Path) -> "Part":
        """Another process's part, that goes on from a checkpoint."""
        other = Part(config)
        other.model.load_state_dict(self.model.state_dict())
        other.steps.load_state_dict(self.saved(folder))
        other.done = self.done
        return other

    @property
    def weights(self) -> list[Tensor]:
        return [parameter.detach() for parameter in self.model.parameters()]


def assert_same_bits(one: list[Tensor], other: list[Tensor]) -> None:
    for left, right in zip(one, other, strict=True):
        assert torch.equal(left, right)
        assert left.isfinite().all()


def test_a_step_in_fp16_is_that_of_pytorch_with_its_scaler() -> None:
    ours = Part(config_of(precision="fp16", clip_norm=0.5)).train(STEPS, spoil=(1, 5)).weights
    model = net()
    optimizer, scaler = torch.optim.AdamW(model.parameters(), lr=0.02, fused=True), torch.amp.GradScaler("cpu")
    for step in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(model, step, Precision("fp16", "cpu"))
        torch.autograd.backward(scaler.scale(loss))
        if step in (1, 5):
            model[0].weight.grad[0, 0] = torch.inf  # type: ignore[index]
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
    assert_same_bits(ours, [parameter.detach() for parameter in model.parameters()])


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_fp16_trains_as_fp32_but_for_rounding(clip_norm: float | None) -> None:
    optimizer = {"name": "sgd", "lr": 0.1}
    half = Part(config_of(precision="fp16", clip_norm=clip_norm, optimizer=optimizer)).train(STEPS).weights
    full = Part(config_of(precision="fp32", clip_norm=clip_norm, optimizer=optimizer)).train(STEPS).weights
    for one, other in zip(half, full, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=5e-3)


def test_small_gradients_do_not_become_zero_in_fp16() -> None:
    gradients = []
    for precision in ("fp16", "fp32"):
        part = Part(config_of(precision=precision))
        loss = loss_of(part.model, 0, part.precision) * 1e-6
        torch.autograd.backward(part.steps.scaled(loss))
        part.steps.take()
        gradients.append(part.model[0].weight.grad)
    torch.testing.assert_close(*gradients, rtol=0.02, atol=1e-9)


def test_a_step_of_which_a_gradient_overflows_is_left_out_and_said() -> None:
    part = Part(config_of(precision="fp16", schedule={"name": "step", "every_epochs": 0.25, "factor": 0.5}))
    rates = []
    for step in range(4):
        before = [weights.clone() for weights in part.weights]
        part.train(1, spoil=(0, 2))
        rates.append(part.steps.rate)
        assert all(map(torch.equal, before, part.weights)) == (step in (0, 2))
    assert part.taken == [False, True, False, True]
    assert rates == [0.01, 0.005, 0.0025, 0.00125]  # the schedule goes by the steps of the run


def test_gradients_that_overflow_at_every_scale_end_a_run_with_what_to_do() -> None:
    part = Part(config_of(precision="fp16", steps=STEPS))
    with pytest.raises(
        DivergedError, match=r"overflow in fp16 though .*; lower optimizer.lr \(now 0.02\), .*bf16"
    ) as it:
        part.train(100, spoil=tuple(range(100)))
    assert "scaled by 3.1e-05" in str(it.value)
    assert part.done == 30  # 65536 / 2^31 is below the least
    assert 2.0**16 / 2**part.done == LEAST_SCALE


CONFIGS: list[dict[str, Any]] = [
    {"precision": "fp32"},
    {"precision": "bf16", "clip_norm": 0.5},
    {"precision": "fp16"},
    {"precision": "fp16", "clip_norm": 0.5, "optimizer": {"name": "muon", "lr": 0.02}},
    {"precision": "fp32", "schedule": {"name": "plateau", "patience": 0, "factor": 0.5, "warmup_steps": 3}},
    {"precision": "fp16", "schedule": {"name": "plateau", "patience": 1, "cooldown": 1, "metric": "loss"}},
    {"schedule": "one_cycle", "optimizer": {"name": "rmsprop", "groups": [{"match": "*.bias", "lr": 0.01}]}},
]


@pytest.mark.parametrize("changes", CONFIGS)
@pytest.mark.parametrize("stop", [3, 6])
def test_a_checkpoint_on_the_way_changes_no_bit(changes: dict[str, Any], stop: int, tmp_path: Path) -> None:
    config, spoil = config_of(**changes), (1, 4, 7) if changes.get("precision") == "fp16" else ()
    whole = Part(config).train(STEPS, spoil)
    first = Part(config).train(stop, spoil)
    second = first.resumed(config, tmp_path).train(STEPS - stop, spoil)
    assert_same_bits(second.weights, whole.weights)
    assert second.steps.rate == whole.steps.rate
    ours, theirs = second.steps.state_dict(), whole.steps.state_dict()
    assert (ours["scaler"], ours["schedule"]) == (theirs["scaler"], theirs["schedule"])


def test_the_scale_of_a_loss_is_part_of_a_checkpoint(tmp_path: Path) -> None:
    config = config_of(precision="fp16")
    first = Part(config).train(5, spoil=(1, 2))
    assert first.saved(tmp_path)["scaler"]["scale"] == 2.0**14
    assert first.resumed(config, tmp_path).steps.state_dict()["scaler"] == first.steps.state_dict()["scaler"]


@pytest.mark.parametrize(("before", "after"), [("fp32", "fp16"), ("fp16", "fp32"), ("fp16", "bf16")])
def test_the_precision_may_change_on_the_way(before: str, after: str, tmp_path: Path) -> None:
    first = Part(config_of(precision=before)).train(4)
    second = first.resumed(config_of(precision=after), tmp_path).train(4)
    assert second.taken == [True] * 4


# -- configuration -----------------------------------------------------------------------------------------------------


def test_a_plateau_goes_by_the_metric_that_it_names() -> None:
    for metric, better in (("accuracy", 2), ("loss", -2), (None, 2)):
        schedule = {"name": "plateau", "patience": 0, "factor": 0.5, "metric": metric}
        part = Part(config_of(schedule=schedule))
        for change in (0, better, 0):
            part.steps.after_evaluation({"accuracy": 5.0 + change, "loss": 5.0 + change})
        assert part.steps.rate == 0.01


def test_a_metric_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"schedule.metric: no metric f1 in this run; one of accuracy, loss"):
        config_of(schedule={"name": "plateau", "metric": "f1"})


def test_a_least_rate_above_all_rates_is_refused() -> None:
    schedule, optimizer = {"name": "plateau", "min_lr": 0.1}, {"name": "sgd", "lr": 0.05}
    with pytest.raises(ConfigError, match=r"schedule.min_lr: min_lr \(0.1\) must be below the learning rate \(0.05\)"):
        config_of(schedule=schedule, optimizer=optimizer)
    config_of(schedule=schedule, optimizer=optimizer | {"groups": [{"match": "0.*", "lr": 0.2}]})
    config_of(schedule=schedule, optimizer={"name": "muon", "lr": 0.05, "others": {"lr": 0.2}})


@pytest.mark.parametrize("schedule", ["cosine", "plateau", {"name": "constant", "warmup_steps": 3}])
def test_rprop_has_no_schedule(schedule: Any) -> None:
    with pytest.raises(ConfigError, match="rprop finds the steps of each weight by itself"):
        config_of(schedule=schedule, optimizer="rprop")
    config_of(optimizer="rprop")
