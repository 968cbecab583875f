"""The layers: PyTorch's own by name, and the positional encoding against its formula."""

import math

import pytest
import torch
from torch import nn

from raytorch.layers import LAYERS
from raytorch.layers.attention import PositionalEncoding


def test_layers_are_pytorchs_own_but_for_the_positional_encoding() -> None:
    for name, layer in LAYERS.items():
        assert layer is (PositionalEncoding if name == "PositionalEncoding" else getattr(nn, name))


def test_every_family_is_in_the_table() -> None:
    wanted = {"Conv3d", "RNN", "LSTM", "GRU", "MultiheadAttention", "PositionalEncoding"}
    assert wanted | {"TransformerEncoderLayer", "TransformerDecoderLayer"} <= LAYERS.keys()


@pytest.mark.parametrize("dim", [1, 6, 7])
def test_positional_encoding_follows_the_formula(dim: int) -> None:
    codes = PositionalEncoding(dim, max_len=50)(torch.zeros(2, 50, dim))
    for position in (0, 1, 13, 49):
        for column in range(dim):
            angle = position / 10000 ** (column // 2 * 2 / dim)
            expected = math.cos(angle) if column % 2 else math.sin(angle)
            assert codes[:, position, column].tolist() == pytest.approx([expected] * 2, abs=1e-6)


def test_positional_encoding_adds_to_the_tokens_and_keeps_their_dtype() -> None:
    layer = PositionalEncoding(8, max_len=5)
    tokens = torch.randn(3, 4, 8)
    torch.testing.assert_close(layer(tokens), tokens + layer(torch.zeros(4, 8)))
    assert layer(tokens.bfloat16()).dtype == torch.bfloat16


def test_positional_encoding_drops_in_training_only() -> None:
    layer = PositionalEncoding(8, dropout=0.5)
    tokens = torch.ones(4, 100, 8)
    dropped = layer(tokens)
    share = (dropped == 0).float().mean().item()
    assert share == pytest.approx(0.5, abs=0.05)
    torch.testing.assert_close(dropped[dropped != 0], 2 * layer.eval()(tokens)[dropped != 0])


def test_positional_encoding_is_not_part_of_a_checkpoint() -> None:
    assert PositionalEncoding(8).state_dict() == {}


def test_positional_encoding_refuses_a_longer_sequence() -> None:
    with pytest.raises(ValueError, match=r"a sequence of 6 tokens exceeds max_len \(5\)"):
        PositionalEncoding(8, max_len=5)(torch.zeros(1, 6, 8))
