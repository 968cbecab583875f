"""Every shipped model in every format: what is read again computes what was written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raytorch import onnx
from raytorch.config import (
    Conv3dModel,
    ConvNetModel,
    GptModel,
    MlpModel,
    ResNet18Model,
    RnnModel,
    Seq2SeqModel,
    VitModel,
)
from raytorch.models.networks import MODELS, Architecture
from raytorch.serialization import load_model, load_program, load_torchscript, load_weights
from raytorch.serialization.comparison import fresh_inputs
from raytorch.training.export import example, export_model

ARCHITECTURES = {
    "mlp": Architecture(MlpModel(hidden=[32]), (1, 8, 8), 10),
    "convnet": Architecture(ConvNetModel(channels=[8, 16], dropout=0.1), (1, 28, 28), 10),
    "resnet18": Architecture(ResNet18Model(), (3, 8, 8), 10),
    "rnn": Architecture(RnnModel(cell="rnn", hidden=16), (1, 8, 8), 10),
    "lstm": Architecture(RnnModel(cell="lstm", hidden=16, layers=2, dropout=0.1), (1, 8, 8), 10),
    "gru": Architecture(RnnModel(cell="gru", hidden=16, bidirectional=True), (3, 6, 9), 10),
    "vit": Architecture(VitModel(patch=7, dim=16, heads=2, feedforward=32, layers=1), (1, 28, 28), 10),
    "conv3d": Architecture(Conv3dModel(channels=[8, 16]), (1, 6, 12, 12), 10),
    "seq2seq": Architecture(
        Seq2SeqModel(columns=7, dim=16, heads=2, feedforward=32, encoder_layers=1, decoder_layers=1, dropout=0.1),
        (1, 28, 56),
        10,
    ),
    "gpt": Architecture(
        GptModel(dim=16, heads=4, kv_heads=2, layers=1, dropout=0.1), facts={"vocabulary": 30, "context": 12}
    ),
}


def _state_dict(architecture: Architecture, model: nn.Module, path: Path) -> Callable[..., Any]:
    torch.save(model.state_dict(), path)
    read = architecture.build().eval()
    read.load_state_dict(load_weights(path))
    return read


def _exported(kind: Any, read: Callable[[Path], Callable[..., Any]]) -> Callable[..., Any]:
    def write_and_read(architecture: Architecture, model: nn.Module, path: Path) -> Callable[..., Any]:
        export_model(model, architecture, kind, path)
        return read(path)

    return write_and_read


FORMATS: dict[str, Callable[[Architecture, nn.Module, Path], Callable[..., Any]]] = {
    "state dict": _state_dict,
    "safetensors": _exported("safetensors", load_model),
    "torchscript": _exported("torchscript", lambda path: load_torchscript(path, trust=True)),
    "pt2": _exported("pt2", lambda path: load_program(path, trust=True).module()),
    "onnx": _exported("onnx", lambda path: lambda *inputs: torch.from_numpy(onnx.load(path).run(*inputs)[0])),
}
# torch.export writes attention out into its parts, which in PyTorch's own inference are one kernel.
TOLERANCES = {("vit", "pt2"): 1e-6, ("seq2seq", "pt2"): 1e-6}


def trained(architecture: Architecture) -> nn.Module:
    """A model whose weights and buffers are not those of a new one, in evaluation mode."""
    torch.manual_seed(0)
    model = architecture.build().eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(1 + 0.2 * torch.rand_like(tensor))
    return model


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_read_again_computes_what_was_written(name: str, form: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    model = trained(architecture)
    read = FORMATS[form](architecture, model, tmp_path / "model.bin")  # the suffix decides nothing
    with torch.no_grad():
        for inputs in fresh_inputs(*example(architecture.build(), architecture)):
            expected: Tensor = model(*inputs.values())
            found: Tensor = read(*inputs.values())
            assert found.dtype == expected.dtype
            tolerance = TOLERANCES.get((name, form), 1e-4 if form == "onnx" else 0)
            assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def test_every_shipped_model_is_among_them() -> None:
    assert {architecture.config.name for architecture in ARCHITECTURES.values()} == MODELS.keys()
