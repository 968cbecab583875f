"""Comparison of an export with its model: fresh inputs of other sizes, and how far the outputs differ."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from raytorch.errors import ExportError

TOLERANCE = 1e-4
"""Largest relative error that an export may have by default; float32 sums in another order differ by some 1e-6."""

Axes = Mapping[str, Mapping[int, str]]
"""Names of the axes of each input whose sizes may change, by the input's name."""


@dataclass(frozen=True)
class Difference:
    """How far one output is from the model's, at most, over all inputs tried."""

    output: str
    absolute: float
    relative: float
    """The largest absolute error by the largest magnitude in the model's output of the same batch."""

    def __str__(self) -> str:
        return f"{self.output}: largest error {self.absolute:.1e}, relative {self.relative:.1e}"


def batch_axes(inputs: Mapping[str, Tensor]) -> Axes:
    """The first axis of every input that has axes, as the one of samples."""
    return {name: {0: "batch"} for name, example in inputs.items() if example.dim()}


def fresh_inputs(inputs: Mapping[str, Tensor], axes: Axes) -> list[dict[str, Tensor]]:
    """Two sets of new random inputs: the changeable axes small in the first, in the second of other sizes.

    The batch has 1 sample, then 3 more than ``inputs`` have; other axes are halved, then as in ``inputs``. Floats are
    drawn from the normal distribution and whole numbers from those in ``inputs``, which are valid.
    """
    sizes = {name: inputs[key].shape[axis] for key, names in axes.items() for axis, name in names.items()}
    batches = {names[0] for names in axes.values() if 0 in names}
    small = {name: 1 if name in batches else max(1, size // 2) for name, size in sizes.items()}
    large = {name: size + 3 if name in batches else size for name, size in sizes.items()}
    with torch.random.fork_rng(devices=[]):
        return [{key: _like(inputs[key], axes.get(key, {}), chosen) for key in inputs} for chosen in (small, large)]


def require_agreement(
    model: nn.Module,
    export: Callable[..., Any],
    trials: Sequence[Mapping[str, Tensor]],
    *,
    tolerance: float = TOLERANCE,
    names: Sequence[str] = (),
) -> list[Difference]:
    """Compare an export with its model, in evaluation mode on the CPU, on inputs by name in their order.

    The model's outputs may be nested in tuples, lists and dicts, of which ``export`` may return a flat list; without
    ``names`` they are numbered. Raises ExportError: it returns others, of other shapes, or too different ones.
    """
    worst: dict[str, Difference] = {}
    for trial in trials:  # each from the state that the model and its export begin with
        with torch.no_grad(), evaluating(model):
            expected = pytree.tree_leaves(model(*trial.values()))
        with torch.no_grad(), unchanged(export) if isinstance(export, nn.Module) else nullcontext():
            found = [torch.as_tensor(output) for output in pytree.tree_leaves(export(*trial.values()))]
        if [output.shape for output in found] != [output.shape for output in expected]:
            raise ExportError(
                f"the export returns {_shapes(found)}, expected {_shapes(expected)} as of the model, for inputs "
                f"{_shapes(trial.values())}; is a size of the example's fixed in the model?"
            )
        for number, (left, right) in enumerate(zip(found, expected, strict=True)):
            name = names[number] if number < len(names) else f"output {number}"
            worst[name] = _larger(worst.get(name, Difference(name, 0, 0)), left, right)
    bad = [difference for difference in worst.values() if not difference.relative <= tolerance]
    if bad:
        raise ExportError(
            f"the export differs from the model: {'; '.join(map(str, bad))}; expected a relative error of at most "
            f"{tolerance:g}; export to another format or opset, or raise the tolerance if that is good enough"
        )
    return list(worst.values())


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Let a model run, and leave it and PyTorch's random numbers as they were before the block.

    Restored are its modules' attributes, modes, buffers and hooks; parameters are left to ``torch.no_grad``.
    """
    modules = list(model.modules())
    training = [module.training for module in modules]
    attributes = [(vars(module), dict(vars(module))) for module in modules]
    values = [value for _, kept in attributes for value in kept.values()]
    containers = [(value, value.copy()) for value in values if isinstance(value, dict | list | set)]
    tensors = [*model.buffers(), *(value for value in values if isinstance(value, Tensor))]
    contents = [(tensor, tensor._version, tensor.detach().clone()) for tensor in tensors if not tensor.is_inference()]
    devices = {tensor.device for tensor in chain(model.parameters(), tensors) if tensor.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for found, kept in [*attributes, *containers]:
            _restore(found, kept)
        for module, mode in zip(modules, training, strict=True):
            if module.training != mode:
                module.training = mode
        with torch.no_grad():
            for tensor, version, content in contents:
                if tensor._version != version:
                    tensor.copy_(content)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Have a model in evaluation mode while the block runs; afterwards it is as it was; see :func:`unchanged`."""
    with unchanged(model):
        model.eval()
        yield


def _restore(found: Any, kept: Any) -> None:
    """Give a container back what it held, in place; what nothing has changed is not touched."""
    if isinstance(found, list):
        found[:] = kept
    elif isinstance(found, set) or found.keys() != kept.keys() or any(found[key] is not kept[key] for key in kept):
        found.clear()
        found.update(kept)


def _like(example: Tensor, axes: Mapping[int, str], sizes: Mapping[str, int]) -> Tensor:
    shape = [sizes[axes[axis]] if axis in axes else size for axis, size in enumerate(example.shape)]
    if example.is_floating_point() or example.is_complex():
        return torch.randn(shape, dtype=example.dtype)
    drawn = torch.randint(example.numel(), shape)
    return example.cpu().flatten()[drawn]


def _larger(seen: Difference, found: Tensor, expected: Tensor) -> Difference:
    """The difference of an output in this batch, or what was seen of it before, whichever is larger."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    same = (found == expected) | (found.isnan() & expected.isnan())
    absolute = (found - expected).abs().masked_fill(same, 0).nan_to_num(nan=torch.inf)
    largest = float(absolute.max()) if absolute.numel() else 0.0
    scale = float(expected.abs().nan_to_num(0, 0, 0).max()) if expected.numel() else 0.0
    relative = largest / scale if scale else largest
    return Difference(seen.output, max(seen.absolute, largest), max(seen.relative, relative))


def _shapes(tensors: Any) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
