"""Optimizers, step by step against PyTorch's own."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from saved_states import load_saved_state, save_state
from torch import Tensor, nn

from raytorch.config import (
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Asgd,
    Muon,
    MuonOthers,
    NAdam,
    Optimizer,
    ParameterGroup,
    RAdam,
    RmsProp,
    Rprop,
    Sgd,
)
from raytorch.errors import CheckpointError, ConfigError
from raytorch.optimizers import OPTIMIZERS, build_optimizer, optimizer_state, restore_optimizer

OPTIMIZER_CASES: list[tuple[Optimizer, type[torch.optim.Optimizer]]] = [
    (Sgd(lr=0.02, momentum=0.8, nesterov=True, weight_decay=0.1), torch.optim.SGD),
    (Sgd(lr=0.02, momentum=0.8, dampening=0.3), torch.optim.SGD),
    (Asgd(lr=0.05, lambd=0.01, alpha=0.5, t0=2, weight_decay=0.1), torch.optim.ASGD),
    (Adam(lr=0.02, betas=(0.8, 0.9), amsgrad=True, weight_decay=0.1), torch.optim.Adam),
    (AdamW(lr=0.02, eps=1e-6, weight_decay=0.2), torch.optim.AdamW),
    (NAdam(lr=0.02, betas=(0.8, 0.9), momentum_decay=0.1, weight_decay=0.1), torch.optim.NAdam),
    (RAdam(lr=0.02, decoupled_weight_decay=True, weight_decay=0.1), torch.optim.RAdam),
    (Adamax(lr=0.02, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1), torch.optim.Adamax),
    (Adafactor(lr=0.05, beta2_decay=-0.6, eps=(1e-6, 1e-2), d=1.5, weight_decay=0.1), torch.optim.Adafactor),
    (Adafactor(), torch.optim.Adafactor),
    (Adagrad(lr=0.05, lr_decay=0.1, initial_accumulator_value=0.2, weight_decay=0.1), torch.optim.Adagrad),
    (Adadelta(lr=0.5, rho=0.8, eps=1e-5, weight_decay=0.1), torch.optim.Adadelta),
    (RmsProp(lr=0.01, alpha=0.9, momentum=0.5, centered=True), torch.optim.RMSprop),
    (Rprop(lr=0.02, etas=(0.4, 1.3), step_sizes=(1e-4, 0.1)), torch.optim.Rprop),
]
MUON = Muon(lr=0.02, momentum=0.9, weight_decay=0.1, ns_steps=3, others=MuonOthers(lr=0.01, weight_decay=0.2))
CONFIGS = [*(config for config, _ in OPTIMIZER_CASES), MUON]
NOT_ARGUMENTS = {"name", "groups", "others"}
OTHER_DEFAULTS = {
    ("sgd", "lr"): 0.1,
    ("sgd", "momentum"): 0.9,
    ("rmsprop", "lr"): 1e-3,
    ("muon", "adjust_lr_fn"): "original",  # which PyTorch's null stands for
}
"""Those that are not PyTorch's."""


def built(config: Optimizer, weights: nn.Parameter) -> torch.optim.Optimizer:
    return build_optimizer(config, [("weights", weights)])


def _descend(optimizer: torch.optim.Optimizer, weights: nn.Parameter) -> torch.Tensor:
    for _ in range(5):
        optimizer.zero_grad()
        (weights**2 - weights).sum().backward()
        optimizer.step()
    return weights.detach()


class Net(nn.Module):
    """A model with a parameter of each number of dimensions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 6)
        self.conv = nn.Conv2d(6, 5, 2, bias=False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.inner = nn.Linear(5, 8)
        self.head = nn.Linear(8, 2)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, tokens: Tensor) -> Tensor:
        images = self.embed(tokens).permute(0, 3, 1, 2)
        out: Tensor = self.head(self.inner(self.conv(images).mean((2, 3))).tanh()) * self.scale
        return out


def steps_of(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, count: int) -> None:
    for step in range(first, first + count):
        tokens = torch.randint(7, (4, 3, 3), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        torch.autograd.backward(model(tokens).square().sum())
        optimizer.step()


def assert_same_bits(one: nn.Module, other: nn.Module) -> None:
    for (name, ours), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        assert ours.isfinite().all()


def assert_steps_as(config: Optimizer, model: Net, references: list[torch.optim.Optimizer], count: int = 6) -> None:
    """The optimizer that ``config`` names takes the steps of others on ``model`` to the bit."""
    ours = Net()
    optimizer = build_optimizer(config, ours.named_parameters())
    for step in range(count):
        steps_of(ours, optimizer, step, 1)
        for reference in references[1:]:
            reference.zero_grad()
        steps_of(model, references[0], step, 1)
        for reference in references[1:]:
            reference.step()
    assert_same_bits(ours, model)
    assert not torch.equal(ours.scale, Net().scale)


@pytest.mark.parametrize(("config", "reference"), OPTIMIZER_CASES)
def test_optimizer_steps_as_pytorchs(config: Optimizer, reference: Callable[..., torch.optim.Optimizer]) -> None:
    theirs = Net()
    settings: dict[str, Any] = config.model_dump(exclude=NOT_ARGUMENTS)
    if reference in (torch.optim.Adam, torch.optim.AdamW):
        settings["fused"] = True
    assert_steps_as(config, theirs, [reference(theirs.parameters(), **settings)])


@pytest.mark.parametrize("kind", get_args(get_args(Optimizer)[0]))
def test_every_field_is_an_argument_of_pytorchs_with_its_default(kind: type[Optimizer]) -> None:
    name = kind.model_fields["name"].default
    arguments = inspect.signature(OPTIMIZERS[name]).parameters
    for key, field in kind.model_fields.items():
        if key not in NOT_ARGUMENTS:
            assert field.default == OTHER_DEFAULTS.get((name, key), arguments[key].default), key
    own = set(kind.model_fields) - NOT_ARGUMENTS
    without_effect = {"params", "foreach", "maximize", "capturable", "differentiable", "fused"}
    assert arguments.keys() - own - without_effect <= {"decoupled_weight_decay"}  # of Adam, which is AdamW


def test_every_optimizer_of_pytorch_that_takes_plain_parameters_is_there() -> None:
    theirs = {each for each in vars(torch.optim).values() if inspect.isclass(each)}
    excluded = {torch.optim.Optimizer, torch.optim.LBFGS, torch.optim.SparseAdam}
    assert set(OPTIMIZERS.values()) == theirs - excluded
    assert [*OPTIMIZERS] == [kind.model_fields["name"].default for kind in get_args(get_args(Optimizer)[0])]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_a_checkpoint_on_the_way_changes_no_bit(config: Optimizer, tmp_path: Path) -> None:
    whole, first, second = Net(), Net(), Net()
    steps_of(whole, build_optimizer(config, whole.named_parameters()), 0, 8)
    optimizer = build_optimizer(config, first.named_parameters())
    steps_of(first, optimizer, 0, 4)
    save_state({"optimizer": optimizer_state(optimizer, first.parameters())}, tmp_path)
    second.load_state_dict(first.state_dict())
    optimizer = build_optimizer(config, second.named_parameters())
    restore_optimizer(optimizer, load_saved_state(tmp_path)["optimizer"], second.parameters())
    steps_of(second, optimizer, 4, 4)
    assert_same_bits(second, whole)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_a_checkpoint_of_another_optimizer_is_refused(config: Optimizer) -> None:
    model = Net()
    other: Optimizer = Adam() if config.name not in ("adam", "adamw", "nadam", "radam") else Adadelta()
    first = build_optimizer(other, model.named_parameters())
    steps_of(model, first, 0, 1)
    second = build_optimizer(config, model.named_parameters())
    with pytest.raises(CheckpointError, match="of another kind of optimizer"):
        restore_optimizer(second, optimizer_state(first, model.parameters()), model.parameters())


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda: Sgd(nesterov=True, dampening=0.1), "nesterov needs a dampening of 0"),
        (lambda: Rprop(step_sizes=(1.0, 0.1)), r"the first number \(1\) must not exceed the second \(0.1\)"),
        (lambda: Rprop(groups=[ParameterGroup(match="*", weight_decay=0.1)]), "rprop has no weight decay"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(wrong: Callable[[], Optimizer], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        wrong()


# -- fused -------------------------------------------------------------------------------------------------------------

FUSED = [(Adam(lr=0.02, weight_decay=0.1), torch.optim.Adam), (AdamW(lr=0.02, amsgrad=True), torch.optim.AdamW)]


@pytest.mark.parametrize(("config", "kind"), FUSED)
def test_fused_steps_are_those_of_the_plain_loop_up_to_rounding(config: Optimizer, kind: Callable[..., Any]) -> None:
    ours, theirs = Net(), Net()
    plain = kind(theirs.parameters(), **config.model_dump(exclude=NOT_ARGUMENTS), foreach=False, fused=False)
    steps_of(theirs, plain, 0, 20)
    optimizer = build_optimizer(config, ours.named_parameters())
    steps_of(ours, optimizer, 0, 20)
    assert optimizer.param_groups[0]["fused"]
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("config", "kind"), FUSED)
def test_a_checkpoint_from_before_steps_were_fused_goes_on(config: Optimizer, kind: Callable[..., Any]) -> None:
    ours, theirs = Net(), Net()
    plain = kind(theirs.parameters(), **config.model_dump(exclude=NOT_ARGUMENTS))
    steps_of(theirs, plain, 0, 5)
    ours.load_state_dict(theirs.state_dict())
    optimizer = build_optimizer(config, ours.named_parameters())
    restore_optimizer(optimizer, optimizer_state(plain, theirs.parameters()), ours.parameters())
    for model, each in ((ours, optimizer), (theirs, plain)):
        steps_of(model, each, 5, 15)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_gradient_that_lies_otherwise_in_memory_is_laid_out_as_its_parameter() -> None:
    taken = []
    for build in (lambda it: built(Adam(), it), lambda it: torch.optim.Adam([it], fused=False)):
        weights = nn.Parameter(torch.arange(96.0).view(2, 3, 4, 4).to(memory_format=torch.channels_last))
        optimizer = build(weights)
        weights.grad = torch.arange(-40.0, 56.0).view(2, 3, 4, 4)
        optimizer.step()
        taken.append(weights.detach())
    torch.testing.assert_close(*taken)


@pytest.mark.parametrize(
    "values",
    [torch.arange(8.0).view(4, 2)[:, :1], torch.arange(4.0).to(torch.complex64), torch.ones(2, device="meta")],
    ids=["with gaps", "complex", "without memory"],
)
def test_parameters_that_a_fused_step_does_not_know_are_trained_by_the_plain_one(values: Tensor) -> None:
    weights, reference = nn.Parameter(values.clone(memory_format=torch.preserve_format)), nn.Parameter(values.clone())
    weights.data, reference.data = values, values.clone()
    ours, theirs = built(AdamW(), weights), torch.optim.AdamW([reference], lr=1e-3)
    for parameter, optimizer in ((weights, ours), (reference, theirs)):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert "fused" not in ours.defaults or not ours.defaults["fused"]
    assert values.is_meta or torch.equal(weights, reference)


# -- Muon --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_muon_trains_the_matrices_that_are_not_named_and_adamw_the_rest(adjust: Any) -> None:
    others = MuonOthers(match=["embed.*", "head.*"], lr=0.01, betas=(0.8, 0.9), weight_decay=0.2)
    config = Muon(lr=0.05, momentum=0.9, adjust_lr_fn=adjust, others=others)
    theirs = Net()
    matrices = [theirs.inner.weight]
    rest = [parameter for parameter in theirs.parameters() if parameter is not theirs.inner.weight]
    muon = torch.optim.Muon(matrices, lr=0.05, momentum=0.9, adjust_lr_fn=adjust)
    adamw = torch.optim.AdamW(rest, lr=0.01, betas=(0.8, 0.9), weight_decay=0.2, fused=True)
    assert_steps_as(config, theirs, [muon, adamw])


def test_groups_change_the_rates_of_muons_and_of_adamws_parameters() -> None:
    groups = [ParameterGroup(match="inner.*", lr=0.3), ParameterGroup(match="*.bias", weight_decay=0.0)]
    optimizer = build_optimizer(MUON.model_copy(update={"groups": groups}), Net().named_parameters())
    shown = [(group["is_muon"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert shown == [(False, 0.3, 0.2), (False, 0.01, 0.0), (False, 0.01, 0.2), (True, 0.3, 0.1), (True, 0.02, 0.1)]


def test_muon_is_one_optimizer_whose_rates_and_state_are_its_own() -> None:
    theirs, ours = Net(), Net()
    matrices = [parameter for parameter in theirs.parameters() if parameter.ndim == 2]
    rest = [parameter for parameter in theirs.parameters() if parameter.ndim != 2]
    arguments = MUON.model_dump(exclude=NOT_ARGUMENTS)
    adamw = torch.optim.AdamW(rest, lr=0.01, weight_decay=0.2, fused=True)
    references = [torch.optim.Muon(matrices, **arguments), adamw]
    optimizer = build_optimizer(MUON, ours.named_parameters())
    for step in range(4):
        for each in (optimizer, *references):
            for group in each.param_groups:
                group["lr"] *= 0.5
        if step == 2:
            fresh = build_optimizer(MUON, ours.named_parameters())
            fresh.load_state_dict(optimizer.state_dict())
            optimizer = fresh
        steps_of(ours, optimizer, step, 1)
        references[1].zero_grad()
        steps_of(theirs, references[0], step, 1)
        references[1].step()
    assert_same_bits(ours, theirs)


def test_muon_of_matrices_alone_needs_no_others() -> None:
    model = nn.Linear(3, 2, bias=False)
    optimizer = build_optimizer(Muon(), model.named_parameters())
    assert [group["is_muon"] for group in optimizer.param_groups] == [True]


@pytest.mark.parametrize(
    ("others", "told"),
    [
        (["haed.*"], r"optimizer.others.match\[0\]: no parameter has a name like 'haed.\*'"),
        (["*"], "muon trains matrices, of which the model has none"),
    ],
)
def test_muon_without_matrices_or_with_names_that_are_not_there_is_refused(others: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        build_optimizer(Muon(others=MuonOthers(match=others)), Net().named_parameters())


def test_what_muon_remembered_is_refused_where_adamw_is_to_go_on() -> None:
    model = Net()
    first = build_optimizer(MUON, model.named_parameters())
    steps_of(model, first, 0, 1)
    moved = MUON.model_copy(update={"others": MuonOthers(match=["head.*"])})
    second = build_optimizer(moved, model.named_parameters())
    with pytest.raises(CheckpointError, match="of another kind of optimizer"):
        restore_optimizer(second, optimizer_state(first, model.parameters()), model.parameters())


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
