"""Transformer layers: PyTorch's own classes.

A causal mask for them is ``torch.nn.Transformer.generate_square_subsequent_mask(length)``.
"""

from torch.nn import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = ["TransformerDecoderLayer", "TransformerEncoderLayer"]
