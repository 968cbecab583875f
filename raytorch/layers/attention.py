"""Attention: PyTorch's MultiheadAttention, and the positional encoding that PyTorch does not have."""

import math

import torch
from torch import Tensor, nn
from torch.nn import MultiheadAttention

__all__ = ["MultiheadAttention", "PositionalEncoding"]


class PositionalEncoding(nn.Module):
    """Adds to each token a sinusoidal code of its position (Vaswani et al., arXiv:1706.03762, section 3.5).

    ``codes[p, 2i] = sin(p / 10000^(2i / dim))`` and ``codes[p, 2i + 1] = cos(p / 10000^(2i / dim))``, then dropout.
    The codes move with the module, but are not part of its state dict: they follow from the arguments.

    Args:
        dim: Width of a token; may be odd.
        dropout: Probability that an element of the sum is dropped in training.
        max_len: Longest sequence.

    Example:
        >>> PositionalEncoding(8)(torch.zeros(2, 5, 8)).shape  # (batch, tokens, dim)
        torch.Size([2, 5, 8])
    """

    codes: Tensor

    def __init__(self, dim: int, dropout: float = 0.0, max_len: int = 5000) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        positions = torch.arange(max_len, dtype=torch.float64).unsqueeze(1)
        rates = torch.exp(torch.arange(0, dim, 2, dtype=torch.float64) * (-math.log(10000.0) / dim))
        angles = positions * rates  # (max_len, ceil(dim / 2))
        codes = torch.stack((angles.sin(), angles.cos()), dim=2).flatten(1)[:, :dim]
        self.register_buffer("codes", codes.to(torch.get_default_dtype(), copy=True), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Encode ``tokens`` (..., length, dim); the result has their shape and dtype.

        Raises:
            ValueError: The sequence is longer than ``max_len``.
        """
        length = tokens.shape[-2]
        if length > len(self.codes):
            raise ValueError(f"a sequence of {length} tokens exceeds max_len ({len(self.codes)})")
        encoded: Tensor = self.dropout(tokens + self.codes[:length].to(tokens.dtype))
        return encoded
