"""Tokens that a model writes, one after the other."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from raytorch.models.gpt import Gpt, KeptTokens


def generate(
    model: nn.Module,
    prompt: Tensor,
    context: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """What a model writes behind a prompt, one token for each sequence at a time, int64 (B,), without end.

    Args:
        model: The model, in evaluation mode: one that ships, which reads each token once, or another whose call takes
            tokens (B, T) and returns the logits of what follows on each, (B, T, vocabulary).
        prompt: Tokens to go on from, int64 (B, T), at least one of each sequence.
        context: How many tokens it reads at most. Where they are full it goes on from the newest half of them.
        temperature: What the logits are divided by before a token is drawn; 0 takes the likeliest.
        top_k: Among how many of the likeliest a token is drawn; None is all.
        generator: What draws, on the model's device.

    Example:
        >>> from itertools import islice
        >>> torch.stack(list(islice(generate(model, prompt, context=256, temperature=0), 20)), dim=1)
    """
    if not (prompt.dim() == 2 and prompt.shape[1]):
        raise ValueError(f"a prompt is of at least one token, (B, T), not {tuple(prompt.shape)}")
    window, kept = prompt[:, -context:], None
    while True:
        if window.shape[1] > context:
            window, kept = window[:, -max(1, context // 2) :], None
        with torch.no_grad():
            logits, kept = _read(model, window, kept)
            following = _drawn(logits, temperature, top_k, generator)
            window = torch.cat([window, following.unsqueeze(1)], dim=1)
        yield following


def _read(model: nn.Module, window: Tensor, kept: KeptTokens | None) -> tuple[Tensor, KeptTokens | None]:
    """The logits of what follows on a window, of which a model that ships reads those that are not kept."""
    if not isinstance(model, Gpt):
        return model(window)[:, -1], None
    kept = kept or model.keeping(len(window))
    return model.extend(window[:, kept.length :], kept), kept


def _drawn(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits.argmax(dim=1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[1]:
        least = logits.topk(top_k, dim=1).values[:, -1:]
        logits = logits.where(logits >= least, -math.inf)
    return torch.multinomial(logits.softmax(dim=1), 1, generator=generator).squeeze(1)
