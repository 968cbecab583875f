"""Transformers of images: one that classifies them, and one that writes out the digits of a strip."""

from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raytorch.datasets.in_memory import END, PAD
from raytorch.layers.attention import MultiheadAttention, PositionalEncoding
from raytorch.layers.conv import Conv2d
from raytorch.layers.transformer import TransformerDecoderLayer, TransformerEncoderLayer
from raytorch.models.objectives import Share, count_of

_BEGIN = 11  # what the decoder reads before the first digit


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


def strip_loss(model: Any, batch: Any, *, label_smoothing: float = 0.0) -> Tensor:
    """Each strip's loss, float32 (B,): the cross-entropy with teacher forcing, averaged over its digits and END."""
    images, targets = batch
    logits = model(images, targets)
    with torch.autocast(logits.device.type, enabled=False):
        losses = F.cross_entropy(
            logits.float().transpose(1, 2),
            targets,
            reduction="none",
            ignore_index=PAD,
            label_smoothing=label_smoothing,
        )
        means: Tensor = losses.sum(dim=1) / (targets != PAD).sum(dim=1)
        return means


def digit_accuracy(model: Any, batch: Any) -> Share:
    """The digits that greedy decoding writes in their place; END and padding do not count."""
    images, targets = batch
    written = model.greedy(images, targets.shape[1])
    is_digit = (targets != END) & (targets != PAD)
    return count_of((written == targets) & is_digit, is_digit)


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
