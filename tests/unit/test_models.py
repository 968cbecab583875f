"""The models: shapes, gradients, learning, and what each of them promises, checked against plain PyTorch."""

import inspect
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from raytorch.config import (
    Conv3dModel,
    ConvNetModel,
    Data,
    MlpModel,
    Model,
    ModelKeys,
    ResNet18Model,
    RnnModel,
    RunConfig,
    Seq2SeqModel,
    VitModel,
)
from raytorch.datasets import END, PAD
from raytorch.errors import ConfigError
from raytorch.models.image_transformers import Seq2Seq
from raytorch.models.networks import MODELS, Architecture
from raytorch.training.precision import autocast

CLASSES = 10
TARGETS = torch.tensor([[3, 1, END, PAD, PAD], [2, 0, 9, 7, END], [5, END, PAD, PAD, PAD], [8, 8, 1, END, PAD]])

CASES: list[Any] = [
    pytest.param(config, shape, id=f"{config.name}-{number}")
    for number, (config, shape) in enumerate(
        [
            (MlpModel(hidden=[16, 8]), (3, 8, 8)),
            (ConvNetModel(channels=[8, 16]), (1, 28, 28)),
            (ConvNetModel(channels=[8, 8, 8], dropout=0.1), (3, 9, 12)),
            (ResNet18Model(), (1, 8, 8)),
            (RnnModel(cell="rnn", hidden=16), (1, 28, 28)),
            (RnnModel(cell="lstm", hidden=16, layers=2, dropout=0.1), (1, 8, 8)),
            (RnnModel(cell="gru", hidden=16, layers=2, bidirectional=True), (3, 8, 9)),
            (VitModel(patch=4, dim=16, heads=2, feedforward=32, layers=2, dropout=0.1), (1, 8, 12)),
            (Conv3dModel(channels=[8, 16]), (1, 3, 8, 9)),
            (Seq2SeqModel(columns=4, dim=16, heads=2, feedforward=32, encoder_layers=1), (1, 6, 24)),
        ]
    )
]


def _build(config: Model, shape: tuple[int, ...]) -> nn.Module:
    torch.manual_seed(0)
    return Architecture(config, shape, CLASSES).build()


def _loss(model: nn.Module, inputs: Tensor) -> Tensor:
    if isinstance(model, Seq2Seq):
        return F.cross_entropy(model(inputs, TARGETS).flatten(0, 1), TARGETS.flatten(), ignore_index=PAD)
    return F.cross_entropy(model(inputs), torch.arange(4))


def _inputs(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(4, *shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("config", "shape"), CASES)
def test_a_models_arguments_are_the_fields_of_its_section(config: Model, shape: tuple[int, ...]) -> None:
    parameters = inspect.signature(MODELS[config.name]).parameters.values()
    keywords = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    assert keywords == type(config).model_fields.keys() - {"name", *ModelKeys.model_fields}


@pytest.mark.parametrize(("config", "shape"), CASES)
def test_a_model_maps_a_batch_to_logits(config: Model, shape: tuple[int, ...]) -> None:
    model, inputs = _build(config, shape), _inputs(shape)
    if isinstance(model, Seq2Seq):
        assert model(inputs, TARGETS).shape == (*TARGETS.shape, END + 1)
    else:
        assert model(inputs).shape == (4, CLASSES)


@pytest.mark.parametrize(("config", "shape"), CASES)
def test_every_parameter_gets_a_gradient(config: Model, shape: tuple[int, ...]) -> None:
    model = _build(config, shape)
    _loss(model, _inputs(shape)).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize(("config", "shape"), CASES)
def test_a_model_learns_a_batch_by_heart(config: Model, shape: tuple[int, ...]) -> None:
    model, inputs = _build(config, shape), _inputs(shape)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    target = 0.5 * _loss(model, inputs).item()
    for _ in range(30):
        optimizer.zero_grad()
        loss = _loss(model, inputs)
        if loss.item() < target:
            return
        loss.backward()
        optimizer.step()
    pytest.fail(f"the loss is still {loss.item():.3f}, above {target:.3f}")


@pytest.mark.parametrize(("config", "shape"), CASES)
def test_a_model_agrees_with_itself_under_bf16_autocast(config: Model, shape: tuple[int, ...]) -> None:
    model, inputs = _build(config, shape).eval(), _inputs(shape)
    with torch.no_grad():
        expected = _loss(model, inputs)
        with autocast("cpu", torch.bfloat16):
            loss = _loss(model, inputs)
    torch.testing.assert_close(loss.float(), expected, rtol=0.05, atol=0.05)


FITTING: list[tuple[dict[str, Any], list[dict[str, Any]]]] = [
    ({"name": "mnist"}, [{"name": "vit", "patch": n, "dim": 4} for n in range(1, 30)]),
    ({"name": "digits"}, [{"name": "convnet", "channels": [2] * n} for n in range(1, 5)]),
    ({"name": "cifar10"}, [{"name": "resnet18"}, {"name": "rnn", "hidden": 1}, {"name": "mlp", "hidden": [1]}]),
    *(
        ({"name": "moving_mnist", "canvas": size}, [{"name": "conv3d", "channels": [1] * n} for n in range(1, 7)])
        for size in (28, 33)
    ),
    *(
        ({"name": "mnist_strips", "max_digits": most}, [{"name": "seq2seq", "columns": n, "dim": 4} for n in (1, 5, 8)])
        for most in (2, 5)
    ),
]


@pytest.mark.parametrize(("data", "models"), FITTING)
def test_a_model_that_validates_reads_its_data_and_another_does_not(
    data: dict[str, Any], models: list[dict[str, Any]]
) -> None:
    shape = TypeAdapter(Data).validate_python(data).input_shape
    for fields in models:
        model = TypeAdapter(Model).validate_python(fields)
        try:
            RunConfig.model_validate({"epochs": 1, "data": data, "model": fields})
        except ValidationError:
            with pytest.raises(ConfigError, match=r"^model\.\w+ .*"):
                _build(model, shape)
        else:
            assert _loss(_build(model, shape), _inputs(shape)).isfinite()


# -- convolutions ------------------------------------------------------------------------------------------------------


def test_convnet_equals_the_plain_network() -> None:
    model = _build(ConvNetModel(channels=[32, 64]), (1, 28, 28))
    first, second, head = (layer for layer in model.modules() if list(layer.parameters(recurse=False)))
    images = _inputs((1, 28, 28))
    x = torch.max_pool2d(torch.relu(F.conv2d(images, first.weight, first.bias, padding=1)), 2)
    x = torch.max_pool2d(torch.relu(F.conv2d(x, second.weight, second.bias, padding=1)), 2)
    expected = F.linear(x.flatten(1), head.weight, head.bias)
    assert head.weight.shape == (10, 64 * 7 * 7)
    torch.testing.assert_close(model(images), expected)


def test_convnet_refuses_an_image_that_is_too_small() -> None:
    with pytest.raises(ConfigError, match=r"model\.channels has 4 entries.*8 x 8 pixels allow for 3"):
        _build(ConvNetModel(channels=[8] * 4), (1, 8, 8))


def test_conv3d_refuses_a_frame_that_is_too_small() -> None:
    with pytest.raises(ConfigError, match=r"model\.channels"):
        _build(Conv3dModel(channels=[8] * 4), (1, 16, 32, 8))


def test_conv3d_ignores_where_a_pattern_is_in_time() -> None:
    model = _build(Conv3dModel(channels=[4]), (1, 8, 8, 8)).eval()
    clips = torch.zeros(2, 1, 8, 8, 8)
    clips[0, :, 2:4] = clips[1, :, 4:6] = torch.randn(1, 2, 8, 8)
    logits = model(clips)
    torch.testing.assert_close(logits[0], logits[1])


@pytest.mark.parametrize(
    ("shape", "stem", "features"), [((1, 32, 32), 3, 32), ((3, 96, 96), 7, 24), ((1, 96, 80), 7, 24)]
)
def test_resnet18_keeps_the_resolution_of_small_images(shape: tuple[int, ...], stem: int, features: int) -> None:
    model = _build(ResNet18Model(), shape)
    assert model.conv1.weight.shape == (64, shape[0], stem, stem)
    sizes = []
    model.layer1.register_forward_hook(lambda _module, _inputs, output: sizes.append(output.shape[2]))
    assert model.eval()(torch.randn(1, *shape)).shape == (1, CLASSES)
    assert sizes == [features]


# -- recurrent ---------------------------------------------------------------------------------------------------------


def test_rnn_reads_the_rows_from_top_to_bottom_and_classifies_the_last_state() -> None:
    model = _build(RnnModel(cell="gru", hidden=5), (3, 4, 6))
    images = _inputs((3, 4, 6))
    cell = nn.GRUCell(18, 5)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in model.cell.state_dict().items()})
    state = torch.zeros(4, 5)
    for row in range(4):
        state = cell(images[:, :, row].flatten(1), state)
    torch.testing.assert_close(model(images), model.head(state))


def test_a_bidirectional_rnn_joins_the_final_states_of_both_directions() -> None:
    model = _build(RnnModel(cell="lstm", hidden=5, layers=2, bidirectional=True), (1, 4, 6))
    images = _inputs((1, 4, 6))
    outputs, _ = model.cell(images.squeeze(1))
    final = torch.cat([outputs[:, -1, :5], outputs[:, 0, 5:]], dim=1)
    torch.testing.assert_close(model(images), model.head(final))


# -- transformers ------------------------------------------------------------------------------------------------------


def test_vit_cuts_the_image_into_patches_row_by_row() -> None:
    model = _build(VitModel(patch=2, dim=8, heads=2), (1, 4, 6))
    images = _inputs((1, 4, 6))
    tokens = model.embed(images).flatten(2).transpose(1, 2)
    patches = F.unfold(images, 2, stride=2).transpose(1, 2)
    torch.testing.assert_close(tokens, F.linear(patches, model.embed.weight.flatten(1), model.embed.bias))


def test_vit_knows_where_a_patch_is() -> None:
    model = _build(VitModel(patch=4, dim=16, heads=2), (1, 8, 8)).eval()
    image = _inputs((1, 8, 8))[:1]
    assert not torch.allclose(model(image), model(image.roll(4, dims=3)), atol=1e-4)


def test_vit_needs_a_patch_that_divides_the_image() -> None:
    with pytest.raises(ConfigError, match=r"model\.patch \(5\) must divide the image's height and width \(28 x 28\)"):
        _build(VitModel(patch=5), (1, 28, 28))


def test_seq2seq_needs_columns_that_divide_the_width() -> None:
    with pytest.raises(ConfigError, match=r"model\.columns \(5\) must divide the image's width \(112\)"):
        _build(Seq2SeqModel(columns=5), (1, 28, 112))


@pytest.fixture
def writer() -> Seq2Seq:
    model = _build(Seq2SeqModel(columns=4, dim=16, heads=2, feedforward=32), (1, 6, 24)).eval()
    assert isinstance(model, Seq2Seq)
    return model


def test_a_later_target_does_not_change_an_earlier_logit(writer: Seq2Seq) -> None:
    images = _inputs((1, 6, 24))
    before = writer(images, TARGETS)
    for position in range(TARGETS.shape[1]):
        changed = TARGETS.clone()
        changed[:, position] = 4
        after = writer(images, changed)
        torch.testing.assert_close(after[:, : position + 1], before[:, : position + 1])
        if position + 1 < TARGETS.shape[1]:
            assert not torch.allclose(after[:, position + 1], before[:, position + 1])


def test_every_slice_of_the_strip_can_change_what_is_written(writer: Seq2Seq) -> None:
    images = _inputs((1, 6, 24))
    before = writer(images, TARGETS)
    for start in range(0, 24, 4):
        changed = images.clone()
        changed[..., start : start + 4] += 1
        assert not torch.allclose(writer(changed, TARGETS), before)


def test_greedy_repeats_the_argmax_of_teacher_forcing(writer: Seq2Seq) -> None:
    images = _inputs((1, 6, 24))
    with torch.no_grad():
        writer.head.bias[END] = -100.0  # an untrained model may say END at once
    written = torch.full((4, 5), PAD)
    for position in range(5):
        written[:, position] = writer(images, written)[:, position].argmax(dim=1)
    assert torch.equal(writer.greedy(images, 5), written)
    assert torch.equal(writer.greedy(images, 3), written[:, :3])


def test_greedy_writes_nothing_after_the_end(writer: Seq2Seq) -> None:
    with torch.no_grad():
        writer.head.bias[END] = 100.0
    assert torch.equal(writer.greedy(_inputs((1, 6, 24)), 3), torch.full((4, 3), END))


def test_one_that_reads_images_is_refused_for_rows_that_no_section_tells_of() -> None:
    with pytest.raises(
        ConfigError, match=r"convnet reads images, and the inputs are of shape \[4\]; take mlp or a mod"
    ):
        Architecture(ConvNetModel(), (4,), 3).build()
