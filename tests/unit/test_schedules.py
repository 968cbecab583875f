"""Learning-rate schedules, step by step against PyTorch's own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from raytorch.config import (
    ConstantSchedule,
    CosineSchedule,
    OneCycleSchedule,
    ParameterGroup,
    PlateauSchedule,
    Ranking,
    Schedule,
    Sgd,
    StepSchedule,
)
from raytorch.errors import CheckpointError, ConfigError
from raytorch.optimizers import build_optimizer
from raytorch.training.schedules import RateSchedule, build_schedule, schedule_factor

TOTAL, EPOCH, PEAK = 60, 20, 0.5


def _learning_rates(
    build: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler | RateSchedule], steps: int
) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = build(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def _ours(config: Schedule, steps: int = TOTAL) -> list[float]:
    return _learning_rates(
        lambda optimizer: build_schedule(config, optimizer, total_steps=steps, steps_per_epoch=EPOCH), steps
    )


def _one_cycle(optimizer: torch.optim.Optimizer, steps: int) -> lr_scheduler.LRScheduler:
    return lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=PEAK,
        total_steps=steps,
        pct_start=0.25,
        cycle_momentum=False,
        div_factor=10,
        final_div_factor=100,
    )


def test_constant_keeps_the_peak() -> None:
    assert _ours(ConstantSchedule()) == [PEAK] * TOTAL


def test_step_equals_step_lr() -> None:
    expected = _learning_rates(lambda optimizer: lr_scheduler.StepLR(optimizer, 30, 0.3), TOTAL)
    assert _ours(StepSchedule(every_epochs=1.5, factor=0.3)) == pytest.approx(expected)


def test_step_changes_at_most_once_a_step() -> None:
    factor = schedule_factor(StepSchedule(every_epochs=0.01, factor=0.5), total_steps=4, steps_per_epoch=EPOCH)
    assert [factor(step) for step in range(4)] == [1, 0.5, 0.25, 0.125]


def test_cosine_equals_cosine_annealing_lr() -> None:
    expected = _learning_rates(
        lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, TOTAL, eta_min=0.1 * PEAK), TOTAL
    )
    assert _ours(CosineSchedule(final=0.1)) == pytest.approx(expected)


@pytest.mark.parametrize("steps", [3, 7, TOTAL])
def test_one_cycle_equals_one_cycle_lr(steps: int) -> None:
    expected = _learning_rates(lambda optimizer: _one_cycle(optimizer, steps), steps)
    assert _ours(OneCycleSchedule(rise=0.25, initial=0.1, final=0.001), steps) == pytest.approx(expected)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_one_cycle_ends_at_its_last_value_however_short(steps: int) -> None:
    factor = schedule_factor(OneCycleSchedule(rise=0.25, final=0.5), total_steps=steps, steps_per_epoch=EPOCH)
    assert factor(steps - 1) == pytest.approx(0.5)


def test_warm_up_equals_linear_lr() -> None:
    warmup = 9
    expected = _learning_rates(
        lambda optimizer: lr_scheduler.LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup), TOTAL
    )
    assert _ours(ConstantSchedule(warmup_steps=warmup)) == pytest.approx(expected)


@pytest.mark.parametrize(
    "schedule",
    [StepSchedule(every_epochs=0.5), CosineSchedule(final=0.1), OneCycleSchedule()],
    ids=lambda schedule: schedule.name,
)
def test_warm_up_rises_to_the_first_value_and_leaves_the_rest_to_the_schedule(schedule: Schedule) -> None:
    warmup = 10
    rates = _ours(schedule.model_copy(update={"warmup_steps": warmup}))
    rest = _ours(schedule, TOTAL - warmup)
    assert rates[:warmup] == pytest.approx([rest[0] * (step + 1) / (warmup + 1) for step in range(warmup)])
    assert rates[warmup:] == pytest.approx(rest)


def test_the_last_value_holds_beyond_the_end() -> None:
    factor = schedule_factor(CosineSchedule(final=0.25), total_steps=TOTAL, steps_per_epoch=EPOCH)
    assert factor(TOTAL) == factor(TOTAL + 5) == pytest.approx(0.25)


def test_warm_up_must_leave_a_step() -> None:
    with pytest.raises(ConfigError, match=r"schedule\.warmup_steps \(60\) must be below the steps of the run \(60\)"):
        schedule_factor(CosineSchedule(warmup_steps=60), total_steps=60, steps_per_epoch=EPOCH)


def optimizer_of(*rates: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates])


@pytest.mark.parametrize("config", [StepSchedule(every_epochs=0.5, factor=0.3), OneCycleSchedule(warmup_steps=3)])
def test_a_schedule_goes_on_at_any_step_with_the_rate_of_the_day(config: Schedule) -> None:
    span = {"total_steps": 12, "steps_per_epoch": 4}
    whole = build_schedule(config, optimizer_of(0.5), **span)
    for step in range(1, 12):
        whole.step()
        other = build_schedule(config, optimizer_of(0.5), **span)
        other.load_state_dict(whole.state_dict(), step)
        assert other.get_last_lr() == whole.get_last_lr()


def test_a_schedule_multiplies_the_rate_of_every_group() -> None:
    config = Sgd(lr=0.1, groups=[ParameterGroup(match="0.*", lr=0.001)])
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = build_optimizer(config, model.named_parameters())
    schedule = build_schedule(StepSchedule(every_epochs=1, factor=0.5), optimizer, total_steps=4, steps_per_epoch=1)
    schedule.step()
    assert schedule.get_last_lr() == [0.0005, 0.05]


# -- plateau -----------------------------------------------------------------------------------------------------------

LOWER, HIGHER = Ranking("loss", higher_is_better=False), Ranking("accuracy", higher_is_better=True)
SPAN = {"total_steps": 200, "steps_per_epoch": 2}
LONG = [1.0, 0.9, 0.9, 0.91, 0.9, 0.8, 0.81, 0.82, 0.79999, 0.9, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, float("nan"), 0.6, 0.6]
SETTINGS: list[dict[str, Any]] = [
    {"patience": 0},
    {"patience": 1, "factor": 0.3, "threshold": 0.05},
    {"patience": 1, "cooldown": 2, "factor": 0.5, "min_lr": 0.02},
    {"patience": 0, "factor": 0.01, "min_lr": 1e-9},  # down to where a change is too small to be one
]


def plateau_rates(schedule: RateSchedule, label: str, values: list[float]) -> list[list[float]]:
    """The rates after each evaluation, between which there are two steps."""
    rates = []
    for value in values:
        schedule.step()
        schedule.step()
        schedule.after_evaluation({"other": 5.0, label: value})
        rates.append(schedule.get_last_lr())
    return rates


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("order", [LOWER, HIGHER])
def test_a_plateau_has_the_rates_of_reduce_lr_on_plateau(order: Ranking, settings: dict[str, Any]) -> None:
    values = [1 - value if order.higher_is_better else value for value in LONG]
    reference = optimizer_of(0.001, 0.1)
    scheduler = lr_scheduler.ReduceLROnPlateau(reference, mode="max" if order.higher_is_better else "min", **settings)
    expected = []
    for value in values:
        scheduler.step(value)
        expected.append([group["lr"] for group in reference.param_groups])
    schedule = build_schedule(PlateauSchedule(**settings), optimizer_of(0.001, 0.1), **SPAN, ranking=order)
    assert plateau_rates(schedule, order.label, values) == expected
    assert len({tuple(rates) for rates in expected}) > 2


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("stop", [0, 1, 4, 7, 13])
def test_a_plateau_goes_on_from_a_checkpoint_to_the_bit(stop: int, settings: dict[str, Any]) -> None:
    config = PlateauSchedule(**settings, warmup_steps=9)
    whole = build_schedule(config, optimizer_of(0.001, 0.1), **SPAN)
    expected = plateau_rates(whole, "loss", LONG)
    first = build_schedule(config, optimizer_of(0.001, 0.1), **SPAN)
    plateau_rates(first, "loss", LONG[:stop])
    second = build_schedule(config, optimizer_of(0.001, 0.1), **SPAN)
    second.load_state_dict(first.state_dict(), 2 * stop)
    assert second.get_last_lr() == first.get_last_lr()
    assert plateau_rates(second, "loss", LONG[stop:]) == expected[stop:]


def test_warm_up_rises_to_what_a_plateau_has_left() -> None:
    schedule = build_schedule(PlateauSchedule(patience=0, factor=0.5, warmup_steps=3), optimizer_of(0.8), **SPAN)
    rates = plateau_rates(schedule, "loss", [1.0, 1.0, 1.0])
    assert rates == [pytest.approx([0.8 * 3 / 4]), [0.4], [0.2]]


def test_a_plateau_of_another_rate_or_of_other_groups_stays_as_much_lower() -> None:
    config = PlateauSchedule(patience=0, factor=0.5)
    first = build_schedule(config, optimizer_of(0.1, 0.8), **SPAN)
    plateau_rates(first, "loss", [1.0, 1.0, 1.0])
    other = build_schedule(config, optimizer_of(0.1, 0.2, 0.4), **SPAN)
    other.load_state_dict(first.state_dict(), 6)
    assert other.get_last_lr() == pytest.approx([0.025, 0.05, 0.1])


def test_a_plateau_of_another_metric_counts_anew_at_the_rate_that_there_is() -> None:
    config = PlateauSchedule(patience=0, factor=0.5)
    first = build_schedule(config, optimizer_of(0.8), **SPAN)
    plateau_rates(first, "loss", [1.0, 1.0])
    other = build_schedule(config, optimizer_of(0.8), **SPAN, ranking=HIGHER)
    other.load_state_dict(first.state_dict(), 4)
    assert plateau_rates(other, "accuracy", [0.1, 0.1]) == [[0.4], [0.2]]


def test_a_plateau_may_follow_another_schedule_and_the_other_way_round() -> None:
    plateau = build_schedule(PlateauSchedule(patience=0, factor=0.5), optimizer_of(0.8), **SPAN)
    plateau.load_state_dict(build_schedule(CosineSchedule(), optimizer_of(0.8), **SPAN).state_dict(), 3)
    assert plateau_rates(plateau, "loss", [1.0, 1.0]) == [[0.8], [0.4]]
    constant = build_schedule(ConstantSchedule(), optimizer_of(0.8), **SPAN)
    constant.load_state_dict(plateau.state_dict(), 7)
    assert constant.get_last_lr() == [0.8]


@pytest.mark.parametrize(
    "damage",
    [{"best": "low"}, {"waited": -1}, {"cooling": 1.5}, {"rates": []}, {"rates": [0.1, 0.1]}, {"peaks": [0.0]}],
)
def test_a_damaged_plateau_is_refused(damage: dict[str, Any]) -> None:
    schedule = build_schedule(PlateauSchedule(), optimizer_of(0.1), **SPAN)
    with pytest.raises(CheckpointError, match=r"plateau, .* is damaged"):
        schedule.load_state_dict(schedule.state_dict() | damage, 1)
