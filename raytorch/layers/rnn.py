"""Recurrent layers: PyTorch's own classes."""

from torch.nn import GRU, LSTM, RNN

__all__ = ["GRU", "LSTM", "RNN"]
