"""Exports: what is compared, what is refused, and what the command line says of it. Needs no Ray."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from raytorch import onnx, serialization
from raytorch.config import MlpModel, Seq2SeqModel
from raytorch.datasets import END
from raytorch.errors import ExportError, UserError
from raytorch.models.image_transformers import Seq2Seq
from raytorch.models.networks import Architecture
from raytorch.runs.local_folder import LocalFolder
from raytorch.serialization import load_model, load_torchscript, save_model, script, trace
from raytorch.serialization.comparison import batch_axes, fresh_inputs, require_agreement
from raytorch.training.export import example, export_model

MLP = Architecture(MlpModel(hidden=[8]), (1, 4, 4), 3)
STRIPS = Architecture(
    Seq2SeqModel(columns=7, dim=16, heads=2, feedforward=32, encoder_layers=1, decoder_layers=1), (1, 28, 56), 10
)


class Branching(nn.Module):
    """Decides in Python by the values of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1


class FixedBatch(nn.Module):
    """Takes the batch's size as a plain number."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1) * len(x)


class Causal(nn.Module):
    """Makes the mask for its transformer itself."""

    def __init__(self, is_causal: bool | None = None) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(3, 1, 4, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.is_causal = is_causal

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.unsqueeze(1).expand(-1, 5, -1)
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        output: Tensor = self.encoder(tokens, mask=mask, is_causal=self.is_causal)
        return output


class Closing(nn.Module):
    """Does what torch.export has no graph for."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy() + 1)


class Counting(nn.Module):
    """Changes a buffer in place, another by a new one, attributes, and what they hold; draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(3))
        self.linear = nn.Linear(3, 3)
        self.count, self.sizes, self.seen = 0, [0], {"last": 0}

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        self.mean = self.mean + x.mean(0)
        self.count += 1
        self.sizes.append(self.count)
        self.seen["last"] = self.count
        return self.linear(x) + self.calls + self.mean + 0 * torch.rand(3)


class Variadic(nn.Module):
    """Takes any number of inputs after the first."""

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        return x * 2 + sum(others)


class Scripted(nn.Module):
    """Uses Python that TorchScript does not know."""

    def forward(self, x: Tensor) -> Tensor:
        return x * eval("2")


def inputs(batch: int = 2) -> dict[str, Tensor]:
    return {"x": torch.randn(batch, 3)}


# -- comparing ---------------------------------------------------------------------------------------------------------


def test_fresh_inputs_have_two_batch_sizes_and_valid_tokens() -> None:
    given, axes = example(STRIPS.build(), STRIPS)
    small, large = fresh_inputs(given, axes)
    assert [small["images"].shape, large["images"].shape] == [(1, 1, 28, 56), (5, 1, 28, 56)]
    assert [small["targets"].shape, large["targets"].shape] == [(1, 4), (5, 8)]
    assert set(large["targets"].flatten().tolist()) <= set(given["targets"].flatten().tolist())
    assert not torch.equal(large["images"][:2], given["images"])


def test_a_model_of_which_nothing_says_what_it_reads_is_refused_with_the_way_that_is_left() -> None:
    with pytest.raises(
        UserError, match=r"reads: let its class have .*; of a run that is there already, .*onnx\.export"
    ):
        example(nn.Identity(), Architecture(MlpModel(hidden=[8])))


def test_the_largest_error_of_each_output_is_reported() -> None:
    model = nn.Identity()
    trials = [{"x": torch.tensor([[1.0, 100.0]])}, {"x": torch.tensor([[2.0, 4.0]])}]
    (difference,) = require_agreement(model, lambda x: x + 0.001, trials, tolerance=1e-3, names=["y"])
    assert difference.output == "y"
    assert difference.absolute == pytest.approx(0.001, rel=1e-2)
    assert difference.relative == pytest.approx(0.001 / 4, rel=1e-2)
    assert str(difference) == "y: largest error 1.0e-03, relative 2.5e-04"


@pytest.mark.parametrize(
    ("export", "told"),
    [
        (
            lambda x: x * 1.01,
            r"differs from the model: output 0: largest error .*; expected a relative error of at most",
        ),
        (lambda x: x * torch.nan, "largest error inf"),
        (lambda x: x[:, :1], r"returns \(2, 1\), expected \(2, 3\)"),
        (lambda x: (x, x), r"returns \(2, 3\), \(2, 3\), expected \(2, 3\)"),
    ],
)
def test_an_export_that_differs_is_an_error(export: Callable[..., Any], told: str) -> None:
    with pytest.raises(ExportError, match=told):
        require_agreement(nn.Identity(), export, [inputs()])


def test_equal_nan_and_infinity_agree() -> None:
    odd = {"x": torch.tensor([[torch.nan, torch.inf, -torch.inf, 1.0]])}
    assert require_agreement(nn.Identity(), torch.clone, [odd])[0].absolute == 0


# -- ONNX --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [None, 18, 23])
def test_an_onnx_export_agrees_and_has_the_opset(tmp_path: Path, opset: int | None) -> None:
    import onnx as official

    path, model = tmp_path / "m.onnx", nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Dropout())
    onnx.export(model, inputs(), path, outputs=["y"], opset=opset)
    assert model.training
    onnx.check(path)
    (difference,) = onnx.verify(model, inputs(), path)
    assert difference.output == "y"
    assert difference.relative < 1e-5
    graph = official.load(path)
    assert graph.opset_import[0].version == (opset or graph.opset_import[0].version)
    assert [dim.dim_param or dim.dim_value for dim in graph.graph.input[0].type.tensor_type.shape.dim] == ["batch", 3]
    assert b".py" not in path.read_bytes()  # where on this machine the code lay


@pytest.mark.parametrize("name", ["m.json", "m.textproto", "m.onnxtxt", "m.ort", "m"])
def test_an_onnx_graph_is_known_by_its_content_whatever_its_name(tmp_path: Path, name: str) -> None:
    model = nn.Linear(3, 4)
    onnx.export(model, inputs(), tmp_path / "m.onnx", outputs=["y"])
    (tmp_path / "m.onnx").rename(tmp_path / name)
    onnx.check(tmp_path / name)
    assert onnx.verify(model, inputs(), tmp_path / name)[0].output == "y"


class Scaled(nn.Module):
    """A model with a number among its inputs."""

    def forward(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return x * factor


def test_an_input_without_axes_has_no_batch(tmp_path: Path) -> None:
    given = {"x": torch.randn(2, 3), "factor": torch.tensor(2.0)}
    onnx.export(Scaled(), given, tmp_path / "m.onnx")
    assert onnx.verify(Scaled(), given, tmp_path / "m.onnx")


def test_an_onnx_graph_of_another_model_is_told(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.export(nn.Linear(3, 4), inputs(), path, outputs=["y"])
    with pytest.raises(ExportError, match="differs from the model: y: largest error"):
        onnx.verify(nn.Linear(3, 4), inputs(), path)


@pytest.mark.parametrize(
    ("model", "opset", "told"),
    [
        (Branching(), None, "Branching cannot be exported; keep values of tensors out of Python's if"),
        (Causal(), None, "Causal cannot be exported; give torch.nn's transformers is_causal=True"),
        (Closing(), None, "Closing cannot be exported; torch.export says: "),
        (FixedBatch(), None, "FixedBatch cannot be exported; take sizes from tensor.shape"),
        (nn.Linear(3, 4), 17, "opset 17 is too old for PyTorch's exporter; expected 18 or newer"),
        (nn.Linear(3, 4), 99, "opset 99"),
        (nn.Linear(2, 4), None, "Linear cannot be exported; it fails on these inputs even as it is: "),
    ],
)
def test_what_cannot_be_exported_is_told(tmp_path: Path, model: nn.Module, opset: int | None, told: str) -> None:
    with pytest.raises(ExportError) as failure:
        onnx.export(model, inputs(), tmp_path / "m.onnx", opset=opset)
    assert str(failure.value).startswith(told)
    assert "\n" not in str(failure.value)
    assert list(tmp_path.iterdir()) == []


def test_a_transformer_that_is_told_of_its_causal_mask_is_exported(tmp_path: Path) -> None:
    model = Causal(is_causal=True)
    onnx.export(model, inputs(), tmp_path / "m.onnx")
    assert onnx.verify(model, inputs(), tmp_path / "m.onnx")


@pytest.mark.parametrize("names", [["x"], ["x", "y"], ["x", "y", "z"]])
def test_a_model_of_any_number_of_inputs_is_exported(tmp_path: Path, names: list[str]) -> None:
    path, given = tmp_path / "m.onnx", {name: torch.randn(2, 3) for name in names}
    onnx.export(Variadic(), given, path)
    with onnx.load(path) as graph:
        assert graph.inputs == names
    (difference,) = onnx.verify(Variadic(), given, path)
    assert difference.relative < 1e-5
    assert torch.equal(serialization.capture(Variadic(), given).module()(*given.values()), Variadic()(*given.values()))


EXAMPLE = {"x": torch.ones(2, 3)}
EXPORTS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "onnx": lambda model, path: onnx.export(model, EXAMPLE, path),
    "capture": lambda model, path: serialization.capture(model, EXAMPLE),
    "trace": lambda model, path: serialization.trace(model, *EXAMPLE.values()),
    "script": lambda model, path: serialization.script(model),
    "agreement": lambda model, path: require_agreement(model, model, fresh_inputs(EXAMPLE, batch_axes(EXAMPLE))),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of the random numbers
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("export", EXPORTS)
def test_an_export_leaves_the_model_and_the_random_numbers_as_they_were(
    tmp_path: Path, export: str, train: bool
) -> None:
    model = Counting().train(train)
    model(torch.randn(2, 3)).sum().backward()
    hook = model.linear.register_forward_hook(lambda *_: None)
    kept = dict([*model.named_buffers(), *model.named_parameters()])
    values = {name: tensor.detach().clone() for name, tensor in kept.items()}
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    before, random = set(vars(model)), torch.get_rng_state()
    try:
        EXPORTS[export](model, tmp_path / "m")
    except ExportError:
        assert export == "script"  # which may have changed the model on its way
    assert torch.equal(torch.get_rng_state(), random)
    assert (model.training, model.linear.training) == (train, train)
    assert (model.count, model.sizes, model.seen) == (1, [0, 1], {"last": 1})
    assert set(vars(model)) == before
    assert list(model.linear._forward_hooks) == [hook.id]
    for name, tensor in [*model.named_buffers(), *model.named_parameters()]:
        assert tensor is kept[name]
        assert torch.equal(tensor, values[name])
        assert tensor.grad is grads.get(name)


def test_a_graph_of_a_model_that_counts_agrees_with_it(tmp_path: Path) -> None:
    model = Counting()
    onnx.export(model, inputs(), tmp_path / "m.onnx")
    (difference,) = onnx.verify(model, inputs(), tmp_path / "m.onnx")
    assert difference.relative < 1e-5
    assert model.count == 0


def test_a_graph_is_run_with_its_inputs_and_freed(tmp_path: Path) -> None:
    path, model = tmp_path / "m.onnx", nn.Linear(3, 4)
    onnx.export(model, inputs(), path, outputs=["y"])
    with onnx.load(path) as graph:
        assert (graph.inputs, graph.outputs) == (["x"], ["y"])
        x = torch.randn(5, 3)
        (found,) = graph.run(x)
        assert np.abs(found - model(x).detach().numpy()).max() < 1e-6
        assert np.array_equal(graph.run(x.numpy())[0], found)
        with pytest.raises(UserError, match=r"m.onnx takes 1 inputs \(x\), not 2"):
            graph.run(x, x)
        for wrong in (torch.randn(5, 2), x.double(), "x"):
            with pytest.raises(UserError, match=r"m.onnx cannot be run with these inputs: "):
                graph.run(wrong)
        with pytest.raises(UserError, match=r"m.onnx cannot be run with these inputs: .*x"):
            graph.run()
    with pytest.raises(UserError, match=r"m.onnx was freed; load it again to run it"):
        graph.run(x)


# -- the models --------------------------------------------------------------------------------------------------------


def test_an_exported_seq2seq_writes_strips_out_as_the_model_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = STRIPS.build().eval()
    assert isinstance(model, Seq2Seq)
    images = torch.randn(6, *STRIPS.input_shape)
    written = model.greedy(images, 7)

    export_model(model, STRIPS, "torchscript", tmp_path / "m.pt")
    assert torch.equal(load_torchscript(tmp_path / "m.pt", trust=True).greedy(images, 7), written)

    export_model(model, STRIPS, "onnx", tmp_path / "m.onnx")
    tokens = np.full((6, 7), END)
    with onnx.load(tmp_path / "m.onnx") as graph:
        for place in range(7):  # the logits of a target depend on those before it
            (logits,) = graph.run(images, tokens)
            tokens[:, place] = logits[:, place].argmax(1)
            if place:
                tokens[tokens[:, place - 1] == END, place] = END
    assert np.array_equal(tokens, written.numpy())


def test_a_model_is_rebuilt_in_its_dtype_without_drawing_random_numbers(tmp_path: Path) -> None:
    model = MLP.build().bfloat16()
    save_model(model, tmp_path / "m.safetensors", MLP)
    torch.manual_seed(3)
    read = load_model(tmp_path / "m.safetensors")
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))
    assert not read.training
    for (name, found), expected in zip(read.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(found, expected), name
        assert found.requires_grad


def test_a_saved_model_can_be_read_by_those_who_can_read_other_files(tmp_path: Path) -> None:
    path, other = tmp_path / "m.safetensors", tmp_path / "other"
    save_model(MLP.build(), path, MLP)
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode


def test_torchscript_trains_and_traces(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    x = torch.randn(4, 3)
    scripted = script(model)
    scripted.train()
    scripted(x).sum().backward()
    assert model[0].weight.grad is not None
    traced = trace(model, x)
    assert model.training
    assert torch.equal(traced(x), model.eval()(x))
    traced.save(str(tmp_path / "m.pt"))
    assert torch.equal(load_torchscript(tmp_path / "m.pt", trust=True)(x), model(x))


def test_what_torchscript_does_not_know_is_told() -> None:
    with pytest.raises(ExportError, match="Scripted cannot be compiled to TorchScript; trace it in its place: "):
        script(Scripted())
    with pytest.raises(ExportError, match="Linear cannot be traced; script it in its place, or give it other inputs: "):
        trace(nn.Linear(3, 3), torch.ones(2, 2))


def test_what_a_killed_export_has_left_goes_with_the_next_one(tmp_path: Path) -> None:
    killed = """
import os, sys
from pathlib import Path
from raytorch.training import export
from raytorch.config import MlpModel
from raytorch.models.networks import Architecture
export._write = lambda model, architecture, kind, path, *_: (path.touch(), os._exit(9))
mlp = Architecture(MlpModel(hidden=[8]), (1, 4, 4), 3)
export.export_model(mlp.build(), mlp, "safetensors", Path(sys.argv[1], "m.safetensors"))
"""
    assert subprocess.run([sys.executable, "-c", killed, tmp_path], check=False).returncode == 9
    (left,) = tmp_path.iterdir()
    under_way = tmp_path / ".export-0123456789abcdef"
    under_way.mkdir()
    with LocalFolder(str(under_way)).locked():
        export_model(MLP.build(), MLP, "safetensors", tmp_path / "m.safetensors", verify=False)
        assert sorted(tmp_path.iterdir()) == [under_way, tmp_path / "m.safetensors"]
    assert not left.exists()
