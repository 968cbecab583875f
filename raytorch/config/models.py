"""Models."""

from typing import Annotated, ClassVar, Literal, Self, get_args

from pydantic import Discriminator, Field, PositiveFloat, PositiveInt, Tag, model_validator

from raytorch.config.model_keys import ModelKeys
from raytorch.config.optimization import LOSSES
from raytorch.config.own_parts import OwnModel, own_or_shipped
from raytorch.config.section import ConflictError, Fraction, Section


class _Named(Section):
    """A section whose name stands before the keys of all models."""

    name: str
    """The model."""


class ShippedModel(ModelKeys, _Named):
    """Base of all models that ship."""

    reads: ClassVar[tuple[str, ...] | None] = ("images",)
    """The kinds of input, as data sets name theirs; None for any."""
    facts: ClassVar[tuple[str, ...]] = ("input_shape", "num_classes")
    """What the data has to tell of itself."""
    losses: ClassVar[tuple[str, ...] | None] = LOSSES
    """Those of raytorch's that it can be trained by; None for any."""
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)
    """Those that it brings; the first ranks its evaluations."""

    def check_input(self, shape: tuple[int, ...]) -> None:
        """Refuse inputs of ``shape``, (C, H, W), of clips (C, T, H, W), that it cannot read. Raises ConflictError."""


class MlpModel(ShippedModel):
    """Fully connected layers with ReLU on the flattened input, an image or a row of a table, say: to classes, or, where
    the data has numbers as targets, to these."""

    reads = ("images", "rows")
    name: Literal["mlp"] = "mlp"
    """The model."""
    hidden: Annotated[list[PositiveInt], Field(min_length=1)] = [128]
    """Width of each hidden layer."""
    dropout: Fraction = 0.0
    """Probability that a hidden unit is dropped in training."""


class ConvNetModel(ShippedModel):
    """3 x 3 convolutions, each followed by ReLU and 2 x 2 max-pooling, then one linear layer."""

    name: Literal["convnet"] = "convnet"
    """The model."""
    channels: Annotated[list[PositiveInt], Field(min_length=1)] = [32, 64]
    """Output channels of each convolution; every entry halves the image's height and width."""
    dropout: Fraction = 0.0
    """Probability that a feature is dropped before the linear layer, in training."""

    def check_input(self, shape: tuple[int, ...]) -> None:
        _check_halving(self.channels, *shape[-2:])


class ResNet18Model(ShippedModel):
    """torchvision's ResNet-18, with a 3 x 3 stem and no first pooling for images of up to 64 pixels."""

    name: Literal["resnet18"] = "resnet18"
    """The model."""


class RnnModel(ShippedModel):
    """A recurrent network that reads an image row by row and classifies its last state."""

    name: Literal["rnn"] = "rnn"
    """The model."""
    cell: Literal["rnn", "lstm", "gru"] = "lstm"
    """Kind of recurrent layer: torch.nn.RNN (tanh), LSTM or GRU."""
    hidden: PositiveInt = 128
    """Width of the hidden state."""
    layers: PositiveInt = 1
    """Stacked recurrent layers."""
    bidirectional: bool = False
    """Read the rows in both directions."""
    dropout: Fraction = 0.0
    """Probability that an output is dropped between stacked layers, in training."""

    @model_validator(mode="after")
    def _dropout_needs_a_stack(self) -> "RnnModel":
        if self.dropout and self.layers == 1:
            raise ConflictError("dropout acts between layers; it needs layers of 2 or more", "dropout", "layers")
        return self


class _Heads(ShippedModel):
    """Base of what attends by several heads."""

    name: str
    """The model."""
    dim: PositiveInt = 64
    """Width of a token's embedding; a multiple of ``heads``."""
    heads: PositiveInt = 4
    """Attention heads."""
    dropout: Fraction = 0.0
    """Probability that an activation is dropped in training."""

    @model_validator(mode="after")
    def _heads_divide_dim(self) -> Self:
        if self.dim % self.heads:
            raise ConflictError(f"dim ({self.dim}) must be a multiple of heads ({self.heads})", "dim", "heads")
        return self


class AttentionModel(_Heads):
    """Base of the transformers of images."""

    feedforward: PositiveInt = 128
    """Width of the feed-forward layer inside a block."""


class VitModel(AttentionModel):
    """A small vision transformer: patches, positional encoding, encoder layers, attention pooling."""

    name: Literal["vit"] = "vit"
    """The model."""
    patch: PositiveInt = 4
    """Height and width of a patch, in pixels; must divide the image's."""
    layers: PositiveInt = 4
    """Encoder layers."""

    def check_input(self, shape: tuple[int, ...]) -> None:
        _, height, width = shape
        if height % self.patch or width % self.patch:
            raise ConflictError(
                f"patch ({self.patch}) must divide the image's height and width ({height} x {width})", "patch"
            )


class Conv3dModel(ShippedModel):
    """3 x 3 x 3 convolutions over time and space, each with batch normalization, ReLU, pooling; then a linear layer."""

    reads = ("clips",)
    name: Literal["conv3d"] = "conv3d"
    """The model."""
    channels: Annotated[list[PositiveInt], Field(min_length=1)] = [16, 32, 64]
    """Output channels of each convolution; every entry halves the frames' height and width."""

    def check_input(self, shape: tuple[int, ...]) -> None:
        _check_halving(self.channels, *shape[-2:])


class Seq2SeqModel(AttentionModel):
    """An encoder-decoder transformer: reads an image as columns of pixels and writes a sequence of digits."""

    reads = ("strips",)
    losses = ("cross_entropy",)
    name: Literal["seq2seq"] = "seq2seq"
    """The model."""
    columns: PositiveInt = 4
    """Width of the image slice that becomes one input token, in pixels; must divide the image's width."""
    encoder_layers: PositiveInt = 2
    """Encoder layers."""
    decoder_layers: PositiveInt = 2
    """Decoder layers."""

    def check_input(self, shape: tuple[int, ...]) -> None:
        width = shape[-1]
        if width % self.columns:
            raise ConflictError(f"columns ({self.columns}) must divide the image's width ({width})", "columns")


class GptModel(_Heads):
    """A decoder that foretells each token from those before it: RMSNorm, rotary positions, no biases."""

    reads = ("tokens",)
    facts = ("vocabulary", "context")
    losses = ("cross_entropy",)
    metrics = ("bits_per_byte", "accuracy")
    name: Literal["gpt"] = "gpt"
    """The model."""
    dim: PositiveInt = 128
    """Width of a token's embedding; a multiple of twice ``heads``."""
    layers: PositiveInt = 4
    """Blocks of attention and feed-forward layer."""
    kv_heads: PositiveInt | None = None
    """Heads of keys and values, each of which serves several of ``heads`` (grouped-query attention); null for as many
    as ``heads``."""
    activation: Literal["swiglu", "relu2"] = "swiglu"
    """Feed-forward layer: SwiGLU, of three matrices, or ``relu2``, of two with the square of ReLU between them."""
    feedforward: PositiveInt | None = None
    """Width of the feed-forward layer inside a block; null for one of 8 ``dim``² weights, a multiple of 64."""
    tied: bool = True
    """Whether the matrix that reads tokens is also the one that writes them."""
    rope_theta: PositiveFloat = 10_000.0
    """Base of the rotary positions, whose wavelengths go up to nearly 2π times as many tokens."""

    @model_validator(mode="after")
    def _heads_go_together(self) -> Self:
        if self.dim % (2 * self.heads):
            raise ConflictError(
                f"dim ({self.dim}) must be a multiple of twice heads (2 x {self.heads}), as positions turn pairs",
                "dim",
                "heads",
            )
        if self.kv_heads and self.heads % self.kv_heads:
            raise ConflictError(
                f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})", "kv_heads", "heads"
            )
        return self


def require_products(model: ModelKeys, workers: int) -> None:
    """Raise ConflictError for a shipped model whose products so many workers cannot compute together."""
    if workers == 1 or not isinstance(model, ShippedModel):  # which says itself what is divided
        return
    if not isinstance(model, GptModel):
        raise ConflictError(
            f"tensor is for model gpt, and for models of your own that have a tensor_plan, not for {model.name}; take "
            "strategy fsdp, or leave it out",
            "parallel.tensor",
            "model.name",
        )
    heads = model.kv_heads or model.heads
    if heads % workers:
        raise ConflictError(
            f"tensor ({workers}) must divide the heads of keys and values ({heads}), of which each worker has some",
            "parallel.tensor",
            "model.kv_heads" if model.kv_heads else "model.heads",
        )
    if model.feedforward and model.feedforward % workers:
        raise ConflictError(
            f"tensor ({workers}) must divide feedforward ({model.feedforward}), of which each worker has a part",
            "parallel.tensor",
            "model.feedforward",
        )


def _check_halving(channels: list[int], height: int, width: int) -> None:
    most = min(height, width).bit_length() - 1
    if len(channels) > most:
        raise ConflictError(
            f"channels has {len(channels)} entries, each of which halves the image; {height} x {width} pixels allow "
            f"for {most}",
            "channels",
        )


Model = Annotated[
    MlpModel | ConvNetModel | ResNet18Model | RnnModel | VitModel | Conv3dModel | Seq2SeqModel | GptModel,
    Field(discriminator="name"),
]
MODELS: tuple[type[ShippedModel], ...] = get_args(get_args(Model)[0])
ModelPart = Annotated[
    Annotated[Model, Tag("shipped")] | Annotated[OwnModel, Tag("own")],
    Discriminator(own_or_shipped),
]
