"""Optimizers and schedules, step by step against PyTorch's own."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from raytorch.config import (
    Adam,
    AdamW,
    ConstantSchedule,
    CosineSchedule,
    OneCycleSchedule,
    Optimizer,
    ParameterGroup,
    RmsProp,
    Schedule,
    Sgd,
    StepSchedule,
)
from raytorch.errors import CheckpointError, ConfigError
from raytorch.optimizers import OPTIMIZERS, build_optimizer, optimizer_state, restore_optimizer
from raytorch.training.schedules import build_schedule, schedule_factor

OPTIMIZER_CASES = [
    (Sgd(lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.1), torch.optim.SGD),
    (RmsProp(lr=0.01, alpha=0.9, momentum=0.5, centered=True), torch.optim.RMSprop),
    (Adam(lr=0.02, betas=(0.8, 0.9), amsgrad=True, weight_decay=0.1), torch.optim.Adam),
    (AdamW(lr=0.02, eps=1e-6, weight_decay=0.2), torch.optim.AdamW),
]


def built(config: Optimizer, weights: nn.Parameter) -> torch.optim.Optimizer:
    return build_optimizer(config, [("weights", weights)])


def _descend(optimizer: torch.optim.Optimizer, weights: nn.Parameter) -> torch.Tensor:
    for _ in range(5):
        optimizer.zero_grad()
        (weights**2 - weights).sum().backward()
        optimizer.step()
    return weights.detach()


@pytest.mark.parametrize(("config", "reference"), OPTIMIZER_CASES)
def test_optimizer_steps_as_pytorchs(config: Optimizer, reference: Callable[..., torch.optim.Optimizer]) -> None:
    ours, theirs = nn.Parameter(torch.arange(4.0)), nn.Parameter(torch.arange(4.0))
    settings: dict[str, Any] = config.model_dump(exclude={"name", "groups"})
    expected = _descend(reference([theirs], **settings), theirs)
    assert torch.equal(_descend(built(config, ours), ours), expected)


@pytest.mark.parametrize("config", [case[0] for case in OPTIMIZER_CASES])
def test_every_field_is_an_argument_of_the_optimizer(config: Optimizer) -> None:
    arguments = inspect.signature(OPTIMIZERS[config.name]).parameters
    assert type(config).model_fields.keys() - {"name", "groups"} <= arguments.keys()


# -- groups ------------------------------------------------------------------------------------------------------------

NO_DECAY: dict[str, Any] = {"match": "*.bias", "weight_decay": 0.0}
SLOW: dict[str, Any] = {"match": "0.*", "lr": 0.001}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> list[torch.Tensor]:
    for step in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(model(torch.full((2, 3), step + 1.0)).square().sum())
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_a_parameter_has_the_settings_of_the_first_group_that_its_name_matches() -> None:
    ours, theirs = net(), net()
    config = AdamW(lr=0.1, weight_decay=0.5, groups=[ParameterGroup(**NO_DECAY), ParameterGroup(**SLOW)])
    groups = [
        {"params": [theirs[0].bias, theirs[2].bias], "weight_decay": 0.0},
        {"params": [theirs[0].weight], "lr": 0.001},
        {"params": [theirs[2].weight]},
    ]
    reference = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.5)
    optimizer = build_optimizer(config, ours.named_parameters())
    for one, other in zip(trained(ours, optimizer), trained(theirs, reference), strict=True):
        assert torch.equal(one, other)


def test_a_schedule_multiplies_the_rate_of_every_group() -> None:
    config = Sgd(lr=0.1, groups=[ParameterGroup(**SLOW)])
    optimizer = build_optimizer(config, net().named_parameters())
    schedule = build_schedule(StepSchedule(every_epochs=1, factor=0.5), optimizer, total_steps=4, steps_per_epoch=1)
    optimizer.step()
    schedule.step()
    assert schedule.get_last_lr() == [0.0005, 0.05]


def test_a_group_that_sets_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="give lr or weight_decay"):
        ParameterGroup(match="*.bias")


def test_what_is_remembered_follows_its_parameter_into_another_group() -> None:
    whole, parted = net(), net()
    plain, grouped = (
        AdamW(lr=0.1),
        AdamW(lr=0.1, groups=[ParameterGroup(match="2.*", lr=0.1), ParameterGroup(match="*.bias", lr=0.1)]),
    )
    expected = trained(whole, build_optimizer(plain, whole.named_parameters()), steps=3)
    first = build_optimizer(plain, parted.named_parameters())
    torch.autograd.backward(parted(torch.full((2, 3), 1.0)).square().sum())
    first.step()
    second = build_optimizer(grouped, parted.named_parameters())
    restore_optimizer(second, optimizer_state(first, parted.parameters()), parted.parameters())
    for step in (2.0, 3.0):
        second.zero_grad()
        torch.autograd.backward(parted(torch.full((2, 3), step)).square().sum())
        second.step()
    for one, other in zip(parted.parameters(), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("patterns", "told"),
    [
        (
            ["0.wieght"],
            r"groups\[0\].match: no parameter has .* '0.wieght' \(did you mean '0.weight'\?\); there are 0.weight, ",
        ),
        (["*", "*.bias"], r"optimizer.groups\[1\].match: no parameter that is left has a name like '\*.bias'"),
    ],
)
def test_a_group_without_parameters_is_refused(patterns: list[str], told: str) -> None:
    config = Sgd(groups=[ParameterGroup(match=pattern, lr=0.1) for pattern in patterns])
    with pytest.raises(ConfigError, match=told):
        build_optimizer(config, net().named_parameters())


# -- going on ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [case[0] for case in OPTIMIZER_CASES])
def test_an_optimizer_that_goes_on_from_what_another_remembered_takes_the_same_steps(config: Optimizer) -> None:
    whole, parted = nn.Parameter(torch.arange(4.0)), nn.Parameter(torch.arange(4.0))
    one = built(config, whole)
    _descend(one, whole)
    _descend(one, whole)
    first = built(config, parted)
    _descend(first, parted)
    second = built(config, parted)
    restore_optimizer(second, optimizer_state(first, [parted]), [parted])
    assert torch.equal(_descend(second, parted), whole.detach())


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Sgd(lr=0.1), Sgd(lr=0.01, momentum=0.5, nesterov=True, weight_decay=0.1)),
        (Sgd(lr=0.1, momentum=0.0), Sgd(lr=0.01, momentum=0.5)),
        (Sgd(lr=0.1), Sgd(lr=0.01, momentum=0.0)),
        (RmsProp(), RmsProp(lr=0.1, alpha=0.5, eps=1e-4, weight_decay=0.1)),
        (RmsProp(), RmsProp(momentum=0.5, centered=True)),
        (RmsProp(momentum=0.5, centered=True), RmsProp()),
        (Adam(), Adam(lr=0.1, betas=(0.5, 0.6), eps=1e-4, weight_decay=0.1)),
        (Adam(), Adam(amsgrad=True)),
        (AdamW(amsgrad=True), AdamW(lr=0.1)),
    ],
)
def test_every_setting_that_has_changed_is_applied(before: Optimizer, after: Optimizer) -> None:
    weights, reference = nn.Parameter(torch.arange(4.0)), nn.Parameter(torch.arange(4.0))
    first = built(before, weights)
    _descend(first, weights)
    second = built(after, weights)
    restore_optimizer(second, optimizer_state(first, [weights]), [weights])

    expected = built(before, reference)
    _descend(expected, reference)
    expected.param_groups[0].update(after.model_dump(exclude={"name", "groups"}))
    state = expected.state[reference]
    for name in ("momentum_buffer", "grad_avg", "max_exp_avg_sq"):
        if second.state[weights].get(name) is not None and state.get(name) is None:
            state[name] = torch.zeros(4)
    assert torch.equal(_descend(second, weights), _descend(expected, reference))


def test_what_an_optimizer_remembers_takes_the_layout_of_its_parameter() -> None:
    weights = nn.Parameter(torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last))
    first = built(Adam(), weights)
    weights.grad = torch.ones_like(weights)
    first.step()
    there = [{name: value.contiguous() for name, value in state.items()} for state in optimizer_state(first, [weights])]
    second = built(Adam(), weights)
    restore_optimizer(second, there, [weights])
    assert second.state[weights]["exp_avg"].stride() == weights.stride()


@pytest.mark.parametrize(
    ("remembered", "told"),
    [
        ([], "has 0 parameters, the model 1"),
        ([{"momentum_buffer": torch.zeros(4)}], "of another kind of optimizer"),
        ([{"step": 3, "exp_avg": torch.zeros(4), "exp_avg_sq": torch.zeros(4)}], "of another kind of optimizer"),
        (
            [{"step": torch.tensor(3.0), "exp_avg": torch.zeros(5), "exp_avg_sq": torch.zeros(4)}],
            "exp_avg does not fit",
        ),
        ([{"step": torch.tensor(3.0), "exp_avg": "much", "exp_avg_sq": torch.zeros(4)}], "exp_avg does not fit"),
    ],
)
def test_what_another_optimizer_remembered_is_refused(remembered: Any, told: str) -> None:
    weights = nn.Parameter(torch.zeros(4))
    with pytest.raises(CheckpointError, match=told):
        restore_optimizer(built(Adam(), weights), remembered, [weights])


@pytest.mark.parametrize("config", [StepSchedule(every_epochs=0.5, factor=0.3), OneCycleSchedule(warmup_steps=3)])
def test_a_schedule_goes_on_at_any_step_with_the_rate_of_the_day(config: Schedule) -> None:
    span = {"total_steps": 12, "steps_per_epoch": 4}
    weights = nn.Parameter(torch.zeros(1))
    whole = built(Sgd(lr=0.5), weights)
    schedule = build_schedule(config, whole, **span)
    for step in range(1, 12):
        whole.step()
        schedule.step()
        other = built(Sgd(lr=0.5), weights)
        build_schedule(config, other, **span)
        build_schedule(config, other, **span, step=step)
        assert other.param_groups[0]["lr"] == whole.param_groups[0]["lr"]


TOTAL, EPOCH, PEAK = 60, 20, 0.5


def _learning_rates(build: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler], steps: int) -> list[float]:
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
