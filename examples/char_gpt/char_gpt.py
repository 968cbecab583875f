"""A small GPT on the bytes of a text: raytorch train examples/char_gpt/char_gpt.yaml

The text is that of pydoc_data.topics, which every Python carries, some 470,000 bytes; data.root and data.train take
another. The blocks are those of Radford et al., Language Models are Unsupervised Multitask Learners, 2019. See
generate() for how the trained model writes:

    >>> net = raytorch.find_run("char-gpt-20261127-120000").model(code="examples/char_gpt/char_gpt.py")
    >>> print(generate(net, "The for statement"))
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

BYTES = 256
"""Tokens that are bytes; the one after them ends a document."""


class Block(nn.Module):
    """Attention to what came before, and two linear layers; each adds to what it reads."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        heads = self.attend(self.before(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)
        dropped = self.dropout if self.training else 0.0
        seen = scaled_dot_product_attention(query, key, value, dropout_p=dropped, is_causal=True)
        x = x + self.project(seen.transpose(1, 2).flatten(2))
        return x + self.feed(self.between(x))


class GPT(nn.Module):
    """Tokens (B, T) to logits of those that follow (B, T, vocabulary); the data says how many there are of both."""

    def __init__(
        self, vocabulary: int, context: int, *, width: int = 160, layers: int = 3, heads: int = 5, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.vocabulary, self.context = vocabulary, context
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.last = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocabulary))

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.last(self.blocks(self.tokens(tokens) + self.places(places)))

    def example_inputs(self) -> dict[str, Tensor]:
        """What it is exported with."""
        return {"tokens": torch.randint(self.vocabulary, (2, self.context))}


def bits_per_byte(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """What the model needs to tell the text, with the ends of its documents."""
    tokens, following = batch
    nats = cross_entropy(model(tokens).flatten(0, 1).float(), following.flatten(), reduction="sum")
    return nats / math.log(2), ((following >= 0) & (following < BYTES)).sum()


def write_down(model: GPT, *, writer: Any, step: int, begin: str = "The ") -> None:
    """What the model writes, into TensorBoard after each evaluation."""
    if writer:
        writer.add_text("text", generate(model, begin), step)


@torch.no_grad()
def generate(net: GPT, text: str, length: int = 200) -> str:
    """Continue a text, each byte drawn from what the model expects."""
    tokens = list(text.encode())
    for _ in range(length):
        logits = net(torch.tensor([tokens[-net.context :]], device=net.places.weight.device))[0, -1]
        tokens.append(int(torch.multinomial(logits[:BYTES].softmax(0), 1)))
    return bytes(tokens).decode(errors="replace")
