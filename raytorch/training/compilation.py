"""What of a model is compiled: blocks that are alike one by one, so that one graph serves all, or all of it."""

from typing import cast

import torch
from torch import nn

from raytorch.training.module_names import kind_of, repeated


def compiled(model: nn.Module) -> nn.Module:
    """The model, compiled with a graph for each shape of batch, so that a resumed run computes with the same ones.

    Blocks are compiled in place, and what is between them runs as it is; without blocks that are alike another module
    around the model is returned.

    Example:
        >>> net = compiled(nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(6)]))
        >>> net(torch.ones(2, 8)).shape  # compiles one of the six
        torch.Size([2, 8])
    """
    blocks = blocks_alike(model)
    for block in blocks:
        block.compile(dynamic=False)
    return model if blocks else cast(nn.Module, torch.compile(model, dynamic=False))


def blocks_alike(model: nn.Module) -> list[nn.Module]:
    """The members of its lists of equal modules, if most of the model's modules are inside of them; else none.

    Two of a class that differ need graphs of their own, of which PyTorch keeps few for a class: there the whole model
    takes fewer.
    """
    blocks = [model.get_submodule(name) for name in repeated(model)]
    blocks = [block for block in blocks if any(block.children())]
    inside = sum(_leaves(block) for block in blocks)
    are_alike = len({kind_of(block) for block in blocks}) == len({_outline(block) for block in blocks})
    return blocks if are_alike and 2 * inside > _leaves(model) else []


def _leaves(model: nn.Module) -> int:
    return sum(not any(module.children()) for module in model.modules())


def _outline(block: nn.Module) -> str:
    """What of a block decides on its graph: its classes, their settings, and the shapes of its tensors."""
    modules = [(name, id(type(module)), _settings(module)) for name, module in block.named_modules()]
    tensors = [
        (name, each.shape, each.requires_grad) for name, each in (*block.named_parameters(), *block.named_buffers())
    ]
    return repr((modules, tensors))


def _settings(module: nn.Module) -> list[tuple[str, object]]:
    return [
        (name, value) for name, value in vars(module).items() if isinstance(value, bool | int | float | str | tuple)
    ]
