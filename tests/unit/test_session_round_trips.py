"""Every kind of handle saved and restored: the same values, gradients, states and random numbers."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_process import local_session, registries
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

import raytorch
from raytorch.models import networks
from raytorch.session.session import Session


def saved(session: Session, path: Path, **options: Any) -> Session:
    """Another session that goes on from the first one's state."""
    session.save(path)
    other = local_session(session.workers)
    other.restore(path, **options)
    return other


DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.complex64, torch.complex128),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tensor_of_any_dtype_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    session = local_session()
    content = torch.tensor([[1.5, 0.0], [-2.0, 4.0]]).abs().to(dtype)
    held = session.tensor(content)
    other = saved(session, tmp_path / "saved").get(held.handle).fetch()
    assert other.dtype == dtype
    assert torch.equal(
        other.float() if "float8" in str(dtype) else other, content.float() if "float8" in str(dtype) else content
    )


def test_views_conjugates_scalars_and_empty_tensors_come_back(tmp_path: Path) -> None:
    session = local_session()
    base = session.tensor(torch.tensor([[1 + 2j, 3 - 4j], [5j, 6.0]]))
    held = [
        base.conj(),
        base.T,
        base.real,
        base.imag,
        session.tensor(2.5),
        session.zeros(0, 3),
        session.ones(1).expand(4),
    ]
    before = [part.fetch() for part in held]
    other = saved(session, tmp_path / "saved")
    for part, content in zip(held, before, strict=True):
        assert torch.equal(other.get(part.handle).fetch(), content)


def test_what_cannot_be_written_is_left_out_and_told(tmp_path: Path) -> None:
    session = local_session()
    kept, sparse = session.ones(2), session.ones(2, 2).to_sparse()
    left_out = session.save(tmp_path / "saved")
    assert left_out == [sparse.handle]
    other = local_session()
    other.restore(tmp_path / "saved")
    assert other.get(kept.handle).tolist() == [1, 1]


def test_a_failed_result_is_left_out(tmp_path: Path) -> None:
    session = local_session()
    failed = session.ones(2) @ session.ones(3)
    with pytest.raises(raytorch.session.session.SessionError):
        failed.item()
    assert session.save(tmp_path / "saved") == [failed.handle]


def test_two_handles_of_one_object_are_one_object_again(tmp_path: Path) -> None:
    session = local_session()
    net = session.module(nn.Linear, 2, 2)
    same = session.get(net.handle, "module")
    other = saved(session, tmp_path / "saved")
    other.get(same.handle, "module").requires_grad_(False)
    assert other.get(net.handle, "module").get("weight.requires_grad") is False


MODULES: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], tuple[int, ...]]] = {
    "linear": (nn.Linear, (4, 3), {"bias": False, "dtype": torch.float64}, (2, 4)),
    "conv": (nn.Conv2d, (3, 4, (3, 1)), {"padding": "same", "padding_mode": "circular"}, (1, 3, 8, 8)),
    "conv3d": (raytorch.layers.Conv3d, (1, 2, 3), {}, (1, 1, 4, 4, 4)),
    "batch_norm": (nn.BatchNorm2d, (3,), {"momentum": 0.3}, (4, 3, 2, 2)),
    "group_norm": (nn.GroupNorm, (2, 4), {}, (2, 4, 3)),
    "layer_norm": (nn.LayerNorm, ([4, 3],), {"eps": 1e-4}, (2, 4, 3)),
    "prelu": (nn.PReLU, (3,), {}, (2, 3)),
    "threshold": (nn.Hardtanh, (-math.inf, 2.0), {}, (2, 3)),
    "bilinear_upsample": (nn.Upsample, (), {"scale_factor": (2.0, 3.0)}, (1, 1, 2, 2)),
    "lstm": (nn.LSTM, (4, 3), {"num_layers": 2, "bidirectional": True}, (5, 2, 4)),
    "gru": (raytorch.layers.GRU, (4, 3), {}, (5, 4)),
    "attention_layer": (nn.TransformerEncoderLayer, (4, 2), {"activation": F.gelu, "dim_feedforward": 8}, (5, 2, 4)),
    "positions": (raytorch.layers.PositionalEncoding, (4,), {"max_len": 7}, (2, 5, 4)),
    "lazy": (nn.LazyLinear, (3,), {}, (2, 4)),
    "lazy_norm": (nn.LazyBatchNorm1d, (), {}, (2, 4)),
    "mlp": (networks.MLP, ((1, 2, 2), 3), {"hidden": [5, 4], "dropout": 0.0}, (2, 1, 2, 2)),
    "convnet": (networks.ConvNet, ((1, 4, 4), 3), {"channels": [2], "dropout": 0.0}, (2, 1, 4, 4)),
    "vit": (
        networks.Vit,
        ((1, 4, 4), 3),
        {"patch": 2, "dim": 4, "heads": 2, "feedforward": 8, "layers": 2, "dropout": 0.0},
        (2, 1, 4, 4),
    ),
    "resnet": (networks.resnet18, ((3, 8, 8), 3), {}, (2, 3, 8, 8)),
}


def outputs(held: Any) -> list[Tensor]:
    parts = held if isinstance(held, tuple) else [held]
    return [tensor for part in parts for tensor in (outputs(part) if isinstance(part, tuple) else [part.fetch()])]


@pytest.mark.parametrize("name", MODULES)
def test_a_module_of_the_list_comes_back_without_trust(tmp_path: Path, name: str) -> None:
    maker, args, options, shape = MODULES[name]
    session = local_session()
    session.manual_seed(1)
    net = session.module(maker, *args, **options)
    x = session.randn(*shape, dtype=options.get("dtype", torch.float32))
    net(x)  # which changes buffers, and gives lazy ones their shapes
    if "batch" not in name and "lazy" not in name:
        net.call("to", torch.float64)  # another dtype than it was made with
        x = x.double()
    assert session.save(tmp_path / "saved") == []
    other = local_session()
    other.restore(tmp_path / "saved")
    again = other.get(net.handle, "module")
    state, restored = net.state_dict(), again.state_dict()
    assert state.keys() == restored.keys()
    for place, tensor in state.items():
        assert torch.equal(tensor, restored[place])
        assert tensor.dtype == restored[place].dtype
    net.eval()
    again.eval()
    for before, after in zip(outputs(net(x)), outputs(again(other.get(x.handle))), strict=True):
        assert torch.equal(before, after)


def test_modules_of_modules_share_what_they_shared(tmp_path: Path) -> None:
    session = local_session()
    layer = session.module(nn.TransformerEncoderLayer, 4, 2, 8, batch_first=True)
    encoder = session.module(nn.TransformerEncoder, layer, 2, session.module(nn.LayerNorm, 4))
    first = session.module(nn.Linear, 4, 4)
    net = session.module(nn.Sequential, first, session.module(nn.ReLU), first, encoder)
    named = session.module(nn.ModuleDict, {"body": net, "norm": encoder})
    average = session.module(torch.optim.swa_utils.AveragedModel, first)
    handles = [held.handle for held in (first, net, named, average)]
    other = saved(session, tmp_path / "saved")
    first, net, named, average = (other.get(handle, "module") for handle in handles)
    first.call("requires_grad_", False)
    assert net.get("2.weight.requires_grad") is False
    assert named.get("body.0.weight.requires_grad") is False
    assert average.get("module.weight.requires_grad") is True


def test_a_module_that_has_no_shapes_yet_gets_them_later(tmp_path: Path) -> None:
    session = local_session()
    net = session.module(nn.LazyLinear, 3)
    other = saved(session, tmp_path / "saved")
    again = other.get(net.handle, "module")
    assert again(other.ones(2, 4)).shape == (2, 3)
    assert again(other.ones(2, 4)).shape == (2, 3)


def test_a_module_that_was_given_other_parts_is_left_out_with_what_depends_on_it(tmp_path: Path) -> None:
    session = local_session()
    net = session.module(nn.Linear, 2, 2)
    net.call("register_buffer", "extra", session.ones(1))
    around = session.module(nn.Sequential, net)
    assert session.save(tmp_path / "saved") == [net.handle, around.handle]


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "Adam": {"lr": 0.1, "amsgrad": True, "betas": (0.8, 0.9)},
    "AdamW": {"lr": np.float64(0.1)},
    "RMSprop": {"lr": 0.1, "centered": True, "momentum": 0.5},
    "Adagrad": {"lr": 0.1},
    "Adadelta": {},
    "Adamax": {},
    "NAdam": {},
    "RAdam": {},
    "Rprop": {},
    "ASGD": {},
    "Adafactor": {},
    "LBFGS": {},
    "Muon": {"lr": 0.1},
}


def trained(net: Any, optimizer: Any, x: Any, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()


def stepped(net: Any, optimizer: Any, x: Any, steps: int) -> None:
    """LBFGS takes a function that computes the loss."""
    for _ in range(steps):
        net._recorder.ask(raytorch.session.worker_functions.call, _closure_step, net, optimizer, x)


def _closure_step(net: Any, optimizer: Any, x: Any) -> None:
    def closure() -> Any:
        optimizer.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_with_the_same_bits(tmp_path: Path, name: str) -> None:
    session = local_session()
    net, x = session.module(nn.Linear, 4, 3, bias=name != "Muon"), session.randn(5, 4)
    optimizer = session.optimizer(getattr(torch.optim, name), net.parameters(), **OPTIMIZERS[name])
    train = stepped if name == "LBFGS" else trained
    train(net, optimizer, x, 2)
    other = saved(session, tmp_path / "saved")
    again, again_optimizer = other.get(net.handle, "module"), other.get(optimizer.handle, "optimizer")
    train(net, optimizer, x, 2)
    train(again, again_optimizer, other.get(x.handle), 2)
    for place, tensor in net.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[place])


def test_groups_that_were_added_come_back(tmp_path: Path) -> None:
    session = local_session()
    first, second = session.ones(2, requires_grad=True), session.ones(2, requires_grad=True)
    optimizer = session.optimizer("sgd", [first], lr=1.0)
    optimizer.call("add_param_group", {"params": [second], "lr": 0.5})
    other = saved(session, tmp_path / "saved")
    again, optimizer = other.get(second.handle), other.get(optimizer.handle, "optimizer")
    again.sum().backward()
    optimizer.step()
    assert again.tolist() == [0.5, 0.5]


SCHEDULERS: dict[str, dict[str, Any]] = {
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [2, 4, 4]},
    "ConstantLR": {"total_iters": 3},
    "LinearLR": {},
    "ExponentialLR": {"gamma": 0.9},
    "PolynomialLR": {"total_iters": 5},
    "CosineAnnealingLR": {"T_max": 5},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "CyclicLR": {"base_lr": 0.1, "max_lr": 0.5},
    "OneCycleLR": {"max_lr": 0.5, "total_steps": 20},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_goes_on_where_it_was(tmp_path: Path, name: str) -> None:
    session = local_session()
    optimizer = session.optimizer("sgd", [session.ones(2, requires_grad=True)], lr=0.1, momentum=0.9)
    scheduler = session.scheduler(getattr(lr_scheduler, name), optimizer, **SCHEDULERS[name])
    for _ in range(3):
        scheduler.step()
    other = saved(session, tmp_path / "saved")
    again, again_optimizer = other.get(scheduler.handle, "scheduler"), other.get(optimizer.handle, "optimizer")
    for _ in range(4):
        assert again_optimizer.lr == optimizer.lr
        scheduler.step()
        again.step()
    assert again.get_last_lr() == scheduler.get_last_lr()


def test_schedulers_of_schedulers_come_back(tmp_path: Path) -> None:
    session = local_session()
    optimizer = session.optimizer("sgd", [session.ones(2, requires_grad=True)], lr=0.1)
    first = session.scheduler(lr_scheduler.ConstantLR, optimizer, factor=0.5, total_iters=2)
    second = session.scheduler(lr_scheduler.ExponentialLR, optimizer, gamma=0.9)
    whole = session.scheduler(lr_scheduler.SequentialLR, optimizer, schedulers=[first, second], milestones=[2])
    plateau = session.scheduler(lr_scheduler.ReduceLROnPlateau, optimizer, patience=1)
    plateau.call("step", 1.0)
    optimizer.step()
    for _ in range(3):
        whole.step()
    other = saved(session, tmp_path / "saved")
    again = other.get(whole.handle, "scheduler")
    whole.step()
    again.step()
    assert again.get_last_lr() == whole.get_last_lr()
    assert other.get(plateau.handle, "scheduler").get("best") == 1.0


class Counting(nn.Module):
    """A class of the user's, with a state beside its tensors and an argument that is no plain value."""

    def __init__(self, options: Any, net: Any) -> None:
        super().__init__()
        self.options, self.net, self.calls = options, net, 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return self.net(x) * self.options["scale"]

    def get_extra_state(self) -> Any:
        return {"calls": self.calls}

    def set_extra_state(self, state: Any) -> None:
        self.calls = state["calls"]


def test_what_is_the_users_own_comes_back_with_trust(tmp_path: Path) -> None:
    session = local_session()
    inner, scale = session.module(nn.Linear, 2, 2), session.tensor([3.0])
    net = session.module(Counting, {"scale": scale}, inner)
    local = nn.Linear(2, 2)
    captured = session.module(lambda: local)
    optimizer = session.optimizer("sgd", [*net.parameters(), *captured.parameters()], lr=1.0)
    decay = session.scheduler(lr_scheduler.LambdaLR, optimizer, lr_lambda=lambda step: 1 / (step + 1))
    decay.step()
    x = session.ones(1, 2)
    before = net(x).fetch()
    assert session.save(tmp_path / "saved") == []
    other = local_session()
    other.restore(tmp_path / "saved", trust=True)
    again, again_captured = other.get(net.handle, "module"), other.get(captured.handle, "module")
    assert again.get("calls") == 1
    assert torch.equal(again(other.get(x.handle)).fetch(), before)
    assert torch.equal(again_captured.state_dict()["weight"], local.weight)
    assert other.get(decay.handle, "scheduler").get_last_lr() == [0.5]
    other.get(scale.handle).zero_()
    assert not again(other.ones(1, 2)).any()
    again_captured(other.ones(1, 2)).sum().backward()
    other.get(optimizer.handle, "optimizer").step()
    assert torch.equal(again_captured.state_dict()["weight"], local.weight - 0.5)


def test_a_restored_tensor_is_the_sessions_own(tmp_path: Path) -> None:
    """Not a part of the file's memory, which others may write to, and in which nothing can be resized."""
    session = local_session()
    x, w = session.ones(3), session.ones(3)
    other = saved(session, tmp_path / "saved")
    for file in (tmp_path / "saved" / "rank-0").iterdir():
        file.write_bytes(b"")
    assert other.get(x.handle).resize_(5)[:3].tolist() == [1, 1, 1]
    (registry,) = registries(other)
    assert registry.get(w.handle).untyped_storage().nbytes() == 12


def test_random_numbers_go_on(tmp_path: Path) -> None:
    session = local_session()
    session.manual_seed(5)
    session.randn(3).fetch()
    session.save(tmp_path / "saved")
    expected = session.randn(3).fetch()
    other = local_session()
    other.restore(tmp_path / "saved")
    assert torch.equal(other.randn(3).fetch(), expected)


def test_a_second_generation_is_as_the_first(tmp_path: Path) -> None:
    session = local_session()
    net = session.module(nn.Sequential, session.module(nn.Linear, 2, 2), session.module(nn.Dropout, 0.5))
    optimizer = session.optimizer("adam", net.parameters(), lr=0.1)
    trained(net, optimizer, session.ones(1, 2), 2)
    other = saved(session, tmp_path / "first")
    other.save(tmp_path / "second")
    texts = [(tmp_path / name / "rank-0" / "session.json").read_text(encoding="utf-8") for name in ("first", "second")]
    assert texts[0] == texts[1]
