"""The models that runs train; the fields of a model's section in the config are its keyword arguments."""

import itertools
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from raytorch.config import CodeSnapshot, ConflictError, ModelKeys, OwnModel, own_code
from raytorch.config.models import ModelPart, ShippedModel
from raytorch.config.own_calls import imported, own_call, without_staying
from raytorch.errors import ConfigError, UserError
from raytorch.layers.conv import AdaptiveAvgPool3d, BatchNorm3d, Conv2d, Conv3d, MaxPool2d, MaxPool3d
from raytorch.layers.rnn import GRU, LSTM, RNN
from raytorch.models.gpt import Gpt
from raytorch.models.image_transformers import Seq2Seq, Vit

_IMAGE = 3
"""Dimensions of an image: channels, height and width."""

Code: TypeAlias = own_code.Code
"""The code of a model of a user's own, or the file or folder that has it."""


class _Description(BaseModel):
    """What is kept of an architecture beside a model's weights."""

    model_config = ConfigDict(strict=True, extra="forbid")

    config: ModelPart
    input_shape: tuple[int, ...] | None
    num_classes: int | None
    facts: dict[str, Any] = {}
    code: dict[str, str] | None = None
    """Of a model of a user's own, the SHA-256 of each file of its code."""


@dataclass(frozen=True)
class Architecture:
    """All that a model is built from, to be kept beside its weights."""

    config: ModelPart
    input_shape: tuple[int, ...] | None = None
    """Of one input: (channels, height, width), for clips (channels, frames, height, width); None if nothing says so."""
    num_classes: int | None = None
    """Of these seq2seq takes no note, as it writes the ten digits."""
    code: CodeSnapshot | None = field(default=None, repr=False)
    """Of a model of the user's own, the code that it is in."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else a data set of the user's own says of itself."""

    @classmethod
    def of(cls, config: ModelPart, facts: Mapping[str, Any], code: CodeSnapshot | None) -> "Architecture":
        """The architecture of a model that is told these ``facts`` of the data; where it began is no part of it."""
        shape, classes = facts.get("input_shape"), facts.get("num_classes")
        others = {name: value for name, value in facts.items() if name not in ("input_shape", "num_classes")}
        return cls(config.as_built(), None if shape is None else tuple(shape), classes, code, others)

    @property
    def maker(self) -> Callable[..., nn.Module]:
        """The class or function that makes the model. Raises ConfigError if own code has none of that name."""
        return MODELS.get(self.config.name) or imported(self.config.name, self.code)

    @classmethod
    def from_json(cls, text: str, code: Code = None) -> "Architecture":
        """What :meth:`to_json` wrote. Raises ValidationError, and ProjectError if ``code`` is not that of then."""
        described = _Description.model_validate_json(text)
        own = isinstance(described.config, OwnModel)
        snapshot = own_code.same_code(described.config.name, described.code or {}, code) if own else None
        return cls(described.config, described.input_shape, described.num_classes, snapshot, described.facts)

    def to_json(self) -> str:
        """Write it down, with the digests of its code in place of that; a run's other code is not the model's."""
        own = self.code if isinstance(self.config, OwnModel) else None
        digests = own.needed_by(self.config.name).digests() if own else None
        described = _Description(
            config=self.config,
            input_shape=self.input_shape,
            num_classes=self.num_classes,
            facts=dict(self.facts),
            code=digests,
        )
        unsaid = {key: True for key, value in (("facts", self.facts), ("code", digests)) if not value}
        return described.model_dump_json(exclude={**unsaid, "config": set(ModelKeys.model_fields)})

    def build(self, device: torch.device | None = None) -> nn.Module:
        """A new model, with PyTorch's default initialization from the global generator.

        It is made on ``device``, by default where PyTorch makes tensors; what its code keeps for every model is not.

        Raises ConfigError if the input does not fit, or its own code does not take its arguments.
        """
        told = {"input_shape": self.input_shape, "num_classes": self.num_classes, **self.facts}
        facts = {name: value for name, value in told.items() if value is not None}
        place = device or nullcontext()
        if isinstance(self.config, OwnModel):
            with without_staying():
                make = own_call("model", self.config, self.code, facts)
            with place:
                model = make()
            if not isinstance(model, nn.Module):
                kind = type(model).__name__
                raise ConfigError(f"model.name: {self.config.name} makes a {kind}, not a torch.nn.Module")
            _require_sizes(model, self.config.name)
            return model
        if "num_targets" in facts:
            facts.setdefault("num_classes", facts["num_targets"])
        _require_facts(self.config, facts)
        options = self.config.model_dump(exclude={"name", *ModelKeys.model_fields})
        with place:
            return self.maker(*(facts[name] for name in self.config.facts), **options)


def _require_facts(config: ShippedModel, facts: Mapping[str, Any]) -> None:
    """Refuse data of which a shipped model cannot read, or that does not say so. Raises ConfigError."""
    if any(name not in facts for name in config.facts):
        others = ", or num_targets where targets are numbers" if "num_classes" in config.facts else ""
        raise ConfigError(
            f"model.name: {config.name} has to know {' and '.join(config.facts)}{others}; let the data set have them "
            "in its facts"
        )
    if "input_shape" not in config.facts:
        for name in config.facts:
            if type(facts[name]) is not int or facts[name] < 1:
                raise ConfigError(f"model.name: the data's {name} is {facts[name]!r:.80}, not a number of at least 1")
        return
    shape = facts["input_shape"]
    if len(shape) < _IMAGE and config.name != "mlp":
        raise ConfigError(
            f"model.name: {config.name} reads images, and the inputs are of shape {list(shape)}; take mlp or a model "
            "of your own"
        )
    try:
        config.check_input(shape)
    except ConflictError as error:
        raise ConfigError(f"model.{error}") from None


def _require_sizes(model: nn.Module, name: str) -> None:
    """Refuse parameters that are made in the first call only, as the optimizer and the checkpoint come before it."""
    lazy = [place for place, each in model.named_parameters() if is_lazy(each)]
    lazy += [place for place, each in model.named_buffers() if is_lazy(each)]
    if lazy:
        raise ConfigError(
            f"model.name: {name} makes a model whose {', '.join(lazy[:3])} has no size before its first call; give "
            "sizes (nn.Linear for nn.LazyLinear) by input_shape or another fact of the data, or call the model once "
            "where it is made"
        )


def require_known_inputs(model: nn.Module, architecture: Architecture) -> None:
    """Refuse to export a model of which nothing says what it reads. Raises UserError."""
    if architecture.input_shape is None and not hasattr(model, "example_inputs"):
        raise UserError(
            f"export: nothing says what {architecture.config.name} reads: let its class have a method example_inputs, "
            "which returns inputs by name, or the data set's facts an input_shape; of a run that is there already, "
            "whose code has to stay as it was, raytorch.onnx.export(model, inputs, path) takes the inputs from Python"
        )


class MLP(nn.Sequential):
    """Fully connected layers with ReLU: inputs (B, ...) to logits (B, num_classes)."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int, *, hidden: list[int], dropout: float) -> None:
        widths = [math.prod(input_shape), *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for fan_in, fan_out in itertools.pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU(), nn.Dropout(dropout)]
        super().__init__(*layers, nn.Linear(widths[-1], num_classes))


class ConvNet(nn.Sequential):
    """3 x 3 convolutions with ReLU and 2 x 2 max-pooling: images (B, C, H, W) to logits (B, num_classes)."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int, *, channels: list[int], dropout: float) -> None:
        _, height, width = input_shape
        height, width = height >> len(channels), width >> len(channels)
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise([input_shape[0], *channels]):
            # ReLU of the maximum is the maximum of the ReLUs, on a quarter of the values.
            layers += [Conv2d(fan_in, fan_out, 3, padding=1), MaxPool2d(2), nn.ReLU()]
        super().__init__(
            *layers, nn.Flatten(), nn.Dropout(dropout), nn.Linear(channels[-1] * height * width, num_classes)
        )


def resnet18(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """torchvision's ResNet-18 (He et al., arXiv:1512.03385): images (B, C, H, W) to logits (B, num_classes).

    Images of up to 64 pixels keep their resolution at first: a 3 x 3 stem without stride or pooling, as in the paper's
    CIFAR-10 networks (section 4.2).
    """
    # Here, because torchvision takes a second to import and no other model needs it.
    from torchvision.models import resnet18 as build

    channels, height, width = input_shape
    model: nn.Module = build(num_classes=num_classes)
    if max(height, width) <= 64:
        model.conv1 = Conv2d(channels, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    elif channels != 3:
        model.conv1 = Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    return model


class Rnn(nn.Module):
    """A recurrent network over an image's rows: images (B, C, H, W) to logits (B, num_classes).

    The last layer's final state is classified; with ``bidirectional``, the final states of both directions.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_classes: int,
        *,
        cell: str,
        hidden: int,
        layers: int,
        bidirectional: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        channels, _, width = input_shape
        build = {"rnn": RNN, "lstm": LSTM, "gru": GRU}[cell]
        self.cell = build(
            channels * width, hidden, layers, batch_first=True, bidirectional=bidirectional, dropout=dropout
        )
        self.bidirectional = bidirectional
        self.head = nn.Linear(2 * hidden if bidirectional else hidden, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        rows = images.transpose(1, 2).flatten(2)  # (B, H, C * W)
        outputs, _ = self.cell(rows)  # (B, H, directions * hidden)
        last = outputs[:, -1]
        if self.bidirectional:
            forwards, backwards = outputs.tensor_split(2, dim=2)
            last = torch.cat([forwards[:, -1], backwards[:, 0]], dim=1)
        logits: Tensor = self.head(last)
        return logits


class Conv3dNet(nn.Sequential):
    """3 x 3 x 3 convolutions over time and space: clips (B, C, T, H, W) to logits (B, num_classes).

    Pooling halves height and width and keeps the frames apart; the last features are averaged over all three.
    """

    def __init__(self, input_shape: tuple[int, ...], num_classes: int, *, channels: list[int]) -> None:
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise([input_shape[0], *channels]):
            layers += [
                Conv3d(fan_in, fan_out, 3, padding=1, bias=False),  # batch normalization brings its own bias
                BatchNorm3d(fan_out),
                nn.ReLU(),
                MaxPool3d((1, 2, 2)),
            ]
        super().__init__(*layers, AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(channels[-1], num_classes))

    @staticmethod
    def example_inputs(input_shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Two random clips."""
        return {"clips": torch.randn(2, *input_shape)}


MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLP,
    "convnet": ConvNet,
    "resnet18": resnet18,
    "rnn": Rnn,
    "vit": Vit,
    "conv3d": Conv3dNet,
    "seq2seq": Seq2Seq,
    "gpt": Gpt,
}
"""Every model by name: a function of the data's facts that its section names, and of the section's fields."""
