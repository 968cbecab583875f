"""The arithmetic of forward and backward."""

import os
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from raytorch.errors import ConfigError
from raytorch.training.precision import Precision, has_bf16

CPU = torch.device("cpu")


AUTO = "bf16" if has_bf16(CPU) else "fp32"
NAMES = [*((name, name) for name in ("fp32", "bf16", "fp16")), ("auto", AUTO), ("tf32", "fp32")]


@pytest.mark.parametrize(("name", "chosen"), NAMES)
def test_a_name_chooses_the_arithmetic(name: Any, chosen: Any) -> None:
    assert Precision.choose(name, CPU) == Precision(chosen, "cpu")


@pytest.mark.parametrize("key", ["avx512_bf16", "amx_bf16", "bf16"])
def test_auto_asks_the_processor(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {key: True, "avx2": True})
    assert Precision.choose("auto", CPU).name == "bf16"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {key: False, "avx2": True})
    assert Precision.choose("auto", CPU).name == "fp32"


@pytest.mark.parametrize(("capability", "chosen"), [((7, 5), "fp32"), ((8, 0), "tf32"), ((9, 0), "tf32")])
def test_tf32_is_fp32_on_gpus_that_have_none(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], chosen: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert Precision.choose("tf32", torch.device("cuda")) == Precision(chosen, "cuda")  # type: ignore[arg-type]


def test_a_process_rounds_what_it_multiplies_with_tf32_alone() -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("tf32", "bf16", "fp32"):
            Precision(name, "cuda").prepare()  # type: ignore[arg-type]
            found[name] = (
                matmul.allow_tf32,
                matmul.fp32_precision,
                cudnn.allow_tf32,
                cudnn.conv.fp32_precision == "tf32",
            )
    exact = (False, "ieee", False, False)
    assert found == {"tf32": (True, "tf32", True, True), "bf16": exact, "fp32": exact}


def test_tf32_casts_nothing_and_scales_no_loss() -> None:
    precision = Precision("tf32", "cuda")
    with precision.autocast():
        assert nn.Linear(4, 2)(torch.ones(3, 4)).dtype == torch.float32
    assert precision.loss_scaler() is None
    assert precision.channels_last


def test_torch_names_the_instructions_that_auto_looks_for() -> None:
    assert torch.cpu.get_capabilities().keys() & {"avx512_bf16", "bf16"}


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_a_forward_pass_computes_in_it_and_weights_stay_float32(name: Any, dtype: torch.dtype) -> None:
    model, precision = nn.Linear(4, 2), Precision(name, "cpu")
    with precision.autocast():
        out = model(torch.ones(3, 4))
    assert out.dtype == dtype
    torch.autograd.backward(out.float().sum())
    assert model.weight.dtype == torch.float32
    assert model.weight.grad is not None
    assert model.weight.grad.dtype == torch.float32


LSTMS = """
import torch
from torch import nn
from raytorch.training.precision import autocast


def train(model, rows, context):
    model.zero_grad()
    with context:
        states, _ = model(rows)
    torch.autograd.backward(states.float().sum())
    return states, [parameter.grad for parameter in model.parameters()]


def computes_in(dtype):
    try:
        return train(nn.LSTM(4, 3), torch.randn(5, 2, 4), torch.autocast("cpu", dtype))[0].dtype
    except RuntimeError:
        return torch.float32


wanted = {dtype: computes_in(dtype) for dtype in (torch.float16, torch.bfloat16)}
for dtype in wanted:
    for options in ({}, {"num_layers": 2, "bidirectional": True}, {"bias": False, "batch_first": True}):
        model, rows = nn.LSTM(4, 3, **options), torch.randn(5, 2, 4)
        states, grads = train(model, rows, autocast("cpu", dtype))
        expected, expected_grads = train(model, rows, torch.autocast("cpu", enabled=False))
        assert states.dtype == wanted[dtype]
        torch.testing.assert_close([states.float(), *grads], [expected, *expected_grads], rtol=0.05, atol=0.05)
        train(nn.Sequential(nn.Linear(4, 4), model), rows, autocast("cpu", dtype))
"""


@pytest.mark.parametrize("limits", [{}, {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}])
def test_autocast_computes_an_lstm_in_float32_only_where_the_processor_must(limits: dict[str, str]) -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", LSTMS], env=os.environ | limits, check=True)


def test_a_gpu_that_has_no_bf16_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    with pytest.raises(
        ConfigError, match=r"precision: bf16: Old GPU cannot compute in bfloat16; take fp16, fp32 or auto"
    ):
        Precision.choose("bf16", gpu)
    assert Precision.choose("auto", gpu).name == "fp32"


@pytest.mark.parametrize(
    ("shape", "layout"), [((2, 3, 4, 5), torch.channels_last), ((2, 3, 4, 5, 6), torch.channels_last_3d)]
)
@pytest.mark.parametrize("precision", [Precision("bf16", "cuda"), Precision("fp16", "cuda"), Precision("fp32", "cpu")])
def test_images_and_clips_are_laid_out_channels_last(
    shape: tuple[int, ...], layout: torch.memory_format, precision: Precision
) -> None:
    images = torch.randn(shape)
    laid_out = precision.layout(images)
    assert laid_out.is_contiguous(memory_format=layout)
    assert torch.equal(laid_out, images)


def test_fp32_on_a_gpu_keeps_the_layout() -> None:
    images = torch.randn(2, 3, 4, 5)
    assert Precision("fp32", "cuda").layout(images) is images


def test_sequences_and_vectors_have_no_channels_to_lay_out() -> None:
    for shape in [(3,), (2, 3), (2, 3, 4)]:
        tensor = torch.randn(shape)
        assert Precision("bf16", "cpu").layout(tensor) is tensor


def test_a_model_is_arranged_in_place_and_computes_the_same() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    inputs = torch.randn(2, 3, 8, 8)
    before, parameters = model(inputs), list(model.parameters())
    assert Precision("bf16", "cpu").to_memory_format(model) is model
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert all(new is old for new, old in zip(model.parameters(), parameters, strict=True))
    torch.testing.assert_close(model(inputs), before)


def test_fp32_on_a_gpu_leaves_a_model_as_it_is() -> None:
    model = Precision("fp32", "cuda").to_memory_format(nn.Conv2d(3, 4, 3))
    assert model.weight.is_contiguous()  # type: ignore[operator, union-attr]
    assert not model.weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[operator, union-attr]
