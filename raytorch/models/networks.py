"""The models that runs train; the fields of a model's section in the config are its keyword arguments."""

import itertools
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from raytorch.config import CodeSnapshot, ConflictError, ModelKeys, OwnModel, own_code
from raytorch.config.models import ModelPart
from raytorch.config.own_calls import imported, own_call, without_staying
from raytorch.datasets.in_memory import END, PAD
from raytorch.errors import ConfigError, UserError
from raytorch.layers.attention import MultiheadAttention, PositionalEncoding
from raytorch.layers.conv import AdaptiveAvgPool3d, BatchNorm3d, Conv2d, Conv3d, MaxPool2d, MaxPool3d
from raytorch.layers.rnn import GRU, LSTM, RNN
from raytorch.layers.transformer import TransformerDecoderLayer, TransformerEncoderLayer
from raytorch.models.objectives import digit_accuracy, strip_loss

_IMAGE = 3
"""Dimensions of an image: channels, height and width."""
_BEGIN = 11  # what the decoder reads before the first digit

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
        outputs = facts.get("num_classes", facts.get("num_targets"))
        if self.input_shape is None or outputs is None:
            raise ConfigError(
                f"model.name: {self.config.name} has to know input_shape and num_classes, or num_targets where targets "
                "are numbers; let the data set have them in its facts"
            )
        if len(self.input_shape) < _IMAGE and self.config.name != "mlp":
            raise ConfigError(
                f"model.name: {self.config.name} reads images, and the inputs are of shape {list(self.input_shape)}; "
                "take mlp or a model of your own"
            )
        try:
            self.config.check_input(self.input_shape)
        except ConflictError as error:
            raise ConfigError(f"model.{error}") from None
        options = self.config.model_dump(exclude={"name", *ModelKeys.model_fields})
        with place:
            return self.maker(self.input_shape, outputs, **options)


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


class Vit(nn.Module):
    """A small vision transformer: images (B, C, H, W) to logits (B, num_classes).

    Patches become tokens (Dosovitskiy et al., arXiv:2010.11929); a learned query attends to the encoded tokens and
    reads the class from them (Zhai et al., arXiv:2106.04560, section 3.3).
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_classes: int,
        *,
        patch: int,
        dim: int,
        heads: int,
        feedforward: int,
        layers: int,
        dropout: float,
    ) -> None:
        super().__init__()
        channels, height, width = input_shape
        self.embed = Conv2d(channels, dim, patch, stride=patch)
        self.position = PositionalEncoding(dim, dropout, max_len=(height // patch) * (width // patch))
        self.encoder = _encoder(dim, heads, feedforward, layers, dropout)
        self.query = nn.Parameter(torch.randn(1, 1, dim) * dim**-0.5)
        self.pool = MultiheadAttention(dim, heads, batch_first=True)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.embed(images).flatten(2).transpose(1, 2)  # (B, patches, dim)
        encoded = self.encoder(self.position(patches))
        query = self.query.expand(images.shape[0], -1, -1)
        pooled, _ = self.pool(query, encoded, encoded, need_weights=False)  # (B, 1, dim)
        logits: Tensor = self.head(pooled.squeeze(1))
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


class Seq2Seq(nn.Module):
    """An encoder-decoder transformer (Vaswani et al., arXiv:1706.03762) that writes out the digits of an image strip.

    Targets are int64 (B, L): digits 0..9, then END, then PAD. The strip is read as slices of
    ``columns`` pixels' width.
    """

    losses = {"cross_entropy": strip_loss}  # noqa: RUF012 - no ClassVar, which TorchScript does not know
    metrics = {"accuracy": digit_accuracy}  # noqa: RUF012
    axes = {"images": {0: "batch"}, "targets": {0: "batch", 1: "length"}}  # noqa: RUF012
    # TorchScript sees a class's constants, but not a module's.
    begin: Final = _BEGIN
    end: Final = END
    pad: Final = PAD

    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_classes: int,
        *,
        columns: int,
        dim: int,
        heads: int,
        feedforward: int,
        encoder_layers: int,
        decoder_layers: int,
        dropout: float,
    ) -> None:
        super().__init__()
        channels, height, width = input_shape
        self.embed = Conv2d(channels, dim, (height, columns), stride=(height, columns))
        self.embed_token = nn.Embedding(_BEGIN + 1, dim)
        # A digit takes at least one column of pixels, and END follows the last.
        self.position = PositionalEncoding(dim, dropout, max_len=width + 1)
        self.encoder = _encoder(dim, heads, feedforward, encoder_layers, dropout)
        self.decoder = nn.ModuleList(
            TransformerDecoderLayer(dim, heads, feedforward, dropout, batch_first=True, norm_first=True)
            for _ in range(decoder_layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, END + 1)

    @staticmethod
    def example_inputs(input_shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Two random strips, and targets whose last is PAD."""
        targets = torch.randint(END + 1, (2, min(8, input_shape[-1])))
        targets[:, -1] = PAD
        return {"images": torch.randn(2, *input_shape), "targets": targets}

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Return logits (B, L, 11) of each target, given the strip (B, C, H, W) and the true targets before it."""
        begin = torch.full((targets.shape[0], 1), self.begin, device=targets.device)
        previous = torch.cat([begin, targets], dim=1)[:, :-1]
        return self._decode(previous.where(previous != self.pad, self.end), self._encode(images))

    @torch.jit.export
    def greedy(self, images: Tensor, length: int) -> Tensor:
        """Write ``length`` tokens, int64 (B, length), each the likeliest after those before it; END repeats itself."""
        with torch.no_grad():
            memory = self._encode(images)
            tokens = torch.full((images.shape[0], 1), self.begin, device=images.device)
            for _ in range(length):
                likeliest = self._decode(tokens, memory)[:, -1].argmax(dim=1)
                following = likeliest.where(tokens[:, -1] != self.end, self.end)
                tokens = torch.cat([tokens, following.unsqueeze(1)], dim=1)
            return tokens[:, 1:]

    def _encode(self, images: Tensor) -> Tensor:
        slices = self.embed(images).flatten(2).transpose(1, 2)  # (B, W / columns, dim)
        memory: Tensor = self.encoder(self.position(slices))
        return memory

    def _decode(self, tokens: Tensor, memory: Tensor) -> Tensor:
        length = tokens.shape[1]
        mask = torch.full((length, length), float("-inf"), device=tokens.device).triu(1)  # causal
        states = self.position(self.embed_token(tokens))
        for layer in self.decoder:
            states = layer(states, memory, tgt_mask=mask, tgt_is_causal=True)
        logits: Tensor = self.head(self.norm(states))
        return logits


def _encoder(dim: int, heads: int, feedforward: int, layers: int, dropout: float) -> nn.Sequential:
    """Encoder layers, normalized before each block and so also at the end (Xiong et al., arXiv:2002.04745)."""
    blocks = (
        TransformerEncoderLayer(dim, heads, feedforward, dropout, batch_first=True, norm_first=True)
        for _ in range(layers)
    )
    return nn.Sequential(*blocks, nn.LayerNorm(dim))


MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLP,
    "convnet": ConvNet,
    "resnet18": resnet18,
    "rnn": Rnn,
    "vit": Vit,
    "conv3d": Conv3dNet,
    "seq2seq": Seq2Seq,
}
"""Every model by name: a function of the input shape, the number of classes and the fields of its section."""
