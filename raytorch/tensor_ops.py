"""Tensor operations by the names that sessions use: PyTorch's own functions, but for ``index``."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from raytorch.overrides import overridable


@overridable
def index(tensor: Tensor, indices: Any) -> Tensor:
    """``tensor[indices]``: one of, or a tuple of, integers, slices, None, Ellipsis, and integer or boolean tensors.

    Integers and slices give a view of ``tensor``, tensors a copy. See ``torch.Tensor.__getitem__``, which as a function
    accepts a ``torch.Tensor`` alone, no handle.
    """
    return tensor[indices]


add = add_scalar = torch.add
sub = torch.sub
mul = mul_scalar = torch.mul
div = torch.div
matmul = torch.matmul
cos = torch.cos
max = torch.max  # noqa: A001
min = torch.min  # noqa: A001
std = torch.std
var = torch.var
norm = torch.linalg.vector_norm  # over all elements by default, as torch.norm, which PyTorch has deprecated
gt = torch.gt
select = torch.select
narrow = torch.narrow
stack = torch.stack

TENSOR_OPS: dict[str, Callable[..., Any]] = {
    "add": add,
    "add_scalar": add_scalar,
    "sub": sub,
    "mul": mul,
    "mul_scalar": mul_scalar,
    "div": div,
    "matmul": matmul,
    "cos": cos,
    "max": max,
    "min": min,
    "std": std,
    "var": var,
    "norm": norm,
    "gt": gt,
    "index": index,
    "select": select,
    "narrow": narrow,
    "stack": stack,
}
"""Every operation by name, with the arguments of the PyTorch function."""
