"""A small GPT on the help texts that every Python carries: raytorch train examples/char_gpt/char_gpt.yaml

The text is that of pydoc_data.topics, some 700,000 characters. The blocks are those of Radford et al., Language Models
are Unsupervised Multitask Learners, 2019. See generate() for how the trained model writes:

    >>> net = raytorch.find_run("char-gpt-20261127-120000").model(code="examples/char_gpt/char_gpt.py")
    >>> print(generate(net, "The for statement"))
"""

import math
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

TEST_SHARE = 0.1
CHARACTERS = "".join(map(chr, (10, *range(32, 127))))
"""All others are read as ``?``."""


class Text:
    """Pieces of ``context`` characters, each with the character that follows; the end of the text is for the test.

    The last piece of a split is shorter: what is missing is padding, -1.
    """

    def __init__(self, split: str, *, context: int = 64) -> None:
        text = "\n".join(text for _, text in sorted(topics.items()))
        codes = {character: code for code, character in enumerate(CHARACTERS)}
        tokens = torch.tensor([codes.get(character, codes["?"]) for character in text])
        cut = int(len(tokens) * (1 - TEST_SHARE))
        self.tokens, self.context = tokens[:cut] if split == "train" else tokens[cut:], context

    @property
    def facts(self) -> dict[str, Any]:
        """What the model is told: the parameters of these names."""
        return {"vocabulary": CHARACTERS, "context": self.context}

    def __len__(self) -> int:
        return math.ceil((len(self.tokens) - 1) / self.context)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        piece = self.tokens[index * self.context : (index + 1) * self.context + 1]
        missing = self.context + 1 - len(piece)
        piece = torch.cat([piece, torch.full((missing,), -1)])
        return {"read": piece[:-1].clamp_min(0), "next": piece[1:]}


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
    """Characters (B, T) to logits of those that follow (B, T, vocabulary)."""

    def __init__(
        self, vocabulary: str, context: int, *, width: int = 96, layers: int = 3, heads: int = 4, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.vocabulary, self.context = vocabulary, context
        self.characters, self.places = nn.Embedding(len(vocabulary), width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.last = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(vocabulary)))

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.last(self.blocks(self.characters(tokens) + self.places(places)))

    def example_inputs(self) -> dict[str, Tensor]:
        """What it is exported with."""
        return {"tokens": torch.randint(len(self.vocabulary), (2, self.context))}


def next_character(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    logits, following = model(batch["read"]), batch["next"]
    total = cross_entropy(logits.flatten(0, 1), following.flatten(), ignore_index=-1, reduction="sum")
    return total, (following >= 0).sum()


def right(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Share of the characters that the model holds to be the likeliest."""
    following = batch["next"]
    return (model(batch["read"]).argmax(2) == following).sum(), (following >= 0).sum()


def bits_per_character(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    total, count = next_character(model, batch)
    return total / math.log(2), count


def write_down(model: GPT, *, writer: Any, step: int, begin: str = "The ") -> None:
    """What the model writes, into TensorBoard after each evaluation."""
    if writer:
        writer.add_text("text", generate(model, begin), step)


@torch.no_grad()
def generate(net: GPT, text: str, length: int = 200) -> str:
    """Continue a text, each character drawn from what the model expects."""
    tokens = [net.vocabulary.index(character) for character in text]
    for _ in range(length):
        logits = net(torch.tensor([tokens[-net.context :]], device=net.places.weight.device))[0, -1]
        tokens.append(int(torch.multinomial(logits.softmax(0), 1)))
    return "".join(net.vocabulary[token] for token in tokens)
