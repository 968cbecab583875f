"""Groups of parameters with a rate or a weight decay of their own, by patterns of their names."""

from typing import Any

import pytest
import torch
from torch import nn

from raytorch.config import AdamW, ParameterGroup, Sgd
from raytorch.errors import ConfigError
from raytorch.optimizers import build_optimizer, optimizer_state, restore_optimizer

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
    reference = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.5, fused=True)
    optimizer = build_optimizer(config, ours.named_parameters())
    for one, other in zip(trained(ours, optimizer), trained(theirs, reference), strict=True):
        assert torch.equal(one, other)


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
