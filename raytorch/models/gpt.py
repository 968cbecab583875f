"""A decoder that foretells each token from those before it, whole sequences at once or with what it has read kept.

The blocks are those of Llama (Touvron et al., arXiv:2302.13971): RMSNorm in front of each part, rotary positions (Su et
al., arXiv:2104.09864), and SwiGLU (Shazeer, arXiv:2002.05202) or the square of ReLU (So et al., arXiv:2109.08668);
heads of keys and values may serve several of queries (Ainslie et al., arXiv:2305.13245). Nothing has a bias.
"""

import math
from dataclasses import dataclass
from typing import Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raytorch.models.objectives import BitsPerByte

EPSILON = 1e-5
_SPREAD = 0.02
"""Standard deviation of new weights; that of what adds to the stream of blocks falls with their number, as in GPT-2."""
_MULTIPLE = 64
_EXAMPLE_TOKENS = 16


class SwiGlu(nn.Module):
    """A feed-forward layer with a gate."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(dim, width, bias=False) for _ in range(2))
        self.down = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return made


class ReluSquared(nn.Module):
    """A feed-forward layer with the square of ReLU."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, width, bias=False)
        self.down = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.down(F.relu(self.up(x)).square())
        return made


_FEEDFORWARDS = {"swiglu": (SwiGlu, 3), "relu2": (ReluSquared, 2)}
"""Each with the number of its matrices."""


@dataclass
class KeptLayer:
    """Keys and values of all tokens that a layer has read, (B, kv_heads, T, head), with room for more behind them."""

    keys: Tensor
    values: Tensor


@dataclass
class KeptTokens:
    """What :meth:`Gpt.extend` keeps of the tokens that it has read, so that none is read again."""

    layers: list[KeptLayer]
    length: int = 0
    """How many there are."""


class Attention(nn.Module):
    """What each token takes from those up to itself."""

    def __init__(self, dim: int, heads: int, kv_heads: int, dropout: float) -> None:
        super().__init__()
        self.head, self.is_grouped, self.dropout = dim // heads, kv_heads != heads, dropout
        self.query = nn.Linear(dim, dim, bias=False)
        self.key, self.value = (nn.Linear(dim, kv_heads * self.head, bias=False) for _ in range(2))
        self.project = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        query, key, value = self.heads_of(x, cos, sin)
        dropped = self.dropout if self.training else 0.0
        seen = F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropped, is_causal=True, enable_gqa=self.is_grouped
        )
        return self.joined(seen)

    def extend(self, x: Tensor, cos: Tensor, sin: Tensor, kept: KeptLayer, start: int) -> Tensor:
        """As :meth:`forward`, of tokens behind the first ``start``, which are kept."""
        query, key, value = self.heads_of(x, cos, sin)
        end = start + x.shape[1]
        kept.keys, kept.values = _with_room(kept.keys, end), _with_room(kept.values, end)
        kept.keys[:, :, start:end], kept.values[:, :, start:end] = key, value
        places = torch.arange(end, device=x.device)
        seen = F.scaled_dot_product_attention(
            query,
            kept.keys[:, :, :end],
            kept.values[:, :, :end],
            attn_mask=places <= places[start:, None],
            enable_gqa=self.is_grouped,
        )
        return self.joined(seen)

    def heads_of(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (B, heads, T, head), the first two turned by where they are."""
        query, key, value = [
            each.unflatten(2, (-1, self.head)).transpose(1, 2) for each in (self.query(x), self.key(x), self.value(x))
        ]
        return _turned(query, cos, sin), _turned(key, cos, sin), value

    def joined(self, seen: Tensor) -> Tensor:
        """What all heads have seen, (B, T, dim)."""
        projected: Tensor = self.project(seen.transpose(1, 2).flatten(2))
        return projected


class Block(nn.Module):
    """Attention and a feed-forward layer, each of which adds to what it reads."""

    def __init__(
        self, dim: int, heads: int, kv_heads: int, activation: str, feedforward: int | None, dropout: float
    ) -> None:
        super().__init__()
        make, matrices = _FEEDFORWARDS[activation]
        width = feedforward or math.ceil(8 * dim / (matrices * _MULTIPLE)) * _MULTIPLE
        self.attention_norm = nn.RMSNorm(dim, EPSILON)
        self.attention = Attention(dim, heads, kv_heads, dropout)
        self.feedforward_norm = nn.RMSNorm(dim, EPSILON)
        self.feedforward = make(dim, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Read tokens (B, T, dim), which stand where the angles of ``cos`` and ``sin`` (T, head / 2) say."""
        return self.fed(x + self.dropout(self.attention(self.attention_norm(x), cos, sin)))

    def extend(self, x: Tensor, cos: Tensor, sin: Tensor, kept: KeptLayer, start: int) -> Tensor:
        """As :meth:`forward`; see :meth:`Attention.extend`."""
        return self.fed(x + self.attention.extend(self.attention_norm(x), cos, sin, kept, start))

    def fed(self, x: Tensor) -> Tensor:
        """The second half of the block."""
        made: Tensor = x + self.dropout(self.feedforward(self.feedforward_norm(x)))
        return made


class TiedHead(nn.Module):
    """The logits of each of the tokens that a matrix has the embeddings of; it has no parameter of its own."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.out_features = vocabulary

    def forward(self, x: Tensor, embeddings: Tensor) -> Tensor:
        return F.linear(x, embeddings)


class Gpt(nn.Module):
    """Tokens int64 (B, T) to the logits of each one's next, (B, T, vocabulary).

    ``context`` is how many tokens it is trained on at once; it reads longer sequences as well, if less surely.
    """

    metrics = {"bits_per_byte": BitsPerByte()}  # noqa: RUF012 - no ClassVar, which TorchScript does not know
    axes = {"tokens": {0: "batch", 1: "length"}}  # noqa: RUF012
    tied: Final[bool]  # so that TorchScript compiles one call of the head alone
    tensor_plan = {  # noqa: RUF012
        "embed": "row",
        "blocks.*.attention": "region",
        "blocks.*.attention.[qkv]*": "column",
        "blocks.*.attention.project": "row",
        "blocks.*.feedforward": "region",
        "blocks.*.feedforward.[gu]*": "column",
        "blocks.*.feedforward.down": "row",
        "head": "gathered",
    }

    def __init__(
        self,
        vocabulary: int,
        context: int,
        *,
        dim: int,
        heads: int,
        layers: int,
        kv_heads: int | None,
        activation: str,
        feedforward: int | None,
        tied: bool,
        dropout: float,
        rope_theta: float,
    ) -> None:
        super().__init__()
        self.vocabulary, self.context = vocabulary, context
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads or heads, dim // heads
        self.rope_theta = rope_theta
        self.embed = nn.Embedding(vocabulary, dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(dim, heads, self.kv_heads, activation, feedforward, dropout) for _ in range(layers)
        )
        self.norm = nn.RMSNorm(dim, EPSILON)
        self.tied = tied
        self.head = TiedHead(vocabulary) if tied else nn.Linear(dim, vocabulary, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        for name, weight in self.named_parameters():
            if weight.dim() == 1:
                nn.init.ones_(weight)
            else:
                is_added = name.endswith((".project.weight", ".down.weight"))
                nn.init.normal_(weight, std=_SPREAD / (math.sqrt(2 * len(self.blocks)) if is_added else 1))

    def example_inputs(self) -> dict[str, Tensor]:
        """Two random sequences."""
        return {"tokens": torch.randint(self.vocabulary, (2, min(_EXAMPLE_TOKENS, self.context)))}

    def forward(self, tokens: Tensor) -> Tensor:
        cos, sin = self.angles(0, tokens.shape[1], tokens.device)
        x = self.dropout(self.embed(tokens))
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.logits(x)

    def extend(self, tokens: Tensor, kept: KeptTokens) -> Tensor:
        """The logits of the next of the last, (B, vocabulary), of tokens (B, T) that follow on those that are kept.

        They are kept, too; all together they can be as many as the context. Nothing is dropped out.

        Example:
            >>> kept = model.keeping(batch=1)
            >>> logits = model.extend(prompt, kept)
            >>> logits = model.extend(logits.argmax(1, keepdim=True), kept)
        """
        start, length = kept.length, tokens.shape[1]
        if start + length > self.context:
            raise ValueError(f"{start + length} tokens exceed the context of {self.context}; keep fewer of them")
        cos, sin = self.angles(start, length, tokens.device)
        x = self.embed(tokens)
        for block, layer in zip(self.blocks, kept.layers, strict=True):
            x = cast(Block, block).extend(x, cos, sin, layer, start)
        kept.length += length
        return self.logits(x[:, -1])

    def keeping(self, batch: int) -> KeptTokens:
        """What :meth:`extend` begins with for ``batch`` sequences."""
        shape, weight = (batch, self.kv_heads, 0, self.head_dim), self.embed.weight
        return KeptTokens([KeptLayer(weight.new_empty(shape), weight.new_empty(shape)) for _ in self.blocks])

    def angles(self, start: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosine and sine of how far each pair of numbers is turned in tokens from ``start`` on, (length, head / 2)."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device) / self.head_dim
        rates = 1.0 / torch.pow(self.rope_theta, exponents)
        places = torch.arange(start, start + length, dtype=torch.float32, device=device)
        angles = places.unsqueeze(1) * rates
        return angles.cos(), angles.sin()

    def logits(self, x: Tensor) -> Tensor:
        """What follows on each token by what the blocks have made of it."""
        x = self.norm(x)
        logits: Tensor = self.head(x, self.embed.weight) if self.tied else self.head(x)
        return logits


def _with_room(kept: Tensor, length: int) -> Tensor:
    """What is kept, with room for ``length`` tokens at least; it doubles, so that few are copied often."""
    there = kept.shape[2]
    if there >= length:
        return kept
    roomy = kept.new_empty(*kept.shape[:2], max(length, 2 * there), kept.shape[3])
    roomy[:, :, :there] = kept
    return roomy


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of numbers, one of the first half and one of the second, turned by their angles."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
