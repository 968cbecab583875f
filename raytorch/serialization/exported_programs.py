"""Exported programs (.pt2): capturing a model with torch.export, and reading the file of one."""

import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from raytorch.serialization.comparison import Axes, batch_axes, evaluating
from raytorch.serialization.file_kinds import FileKind, require
from raytorch.serialization.refusals import StrPath, explaining_damage, refuse, require_trust


def capture(model: nn.Module, inputs: Mapping[str, Tensor], axes: Axes | None = None) -> ExportedProgram:
    """``torch.export`` of a model in evaluation mode, without the places in the source that its nodes come from.

    Args:
        model: The model.
        inputs: An example of each input by name, in the order of the model's arguments, two samples or more.
        axes: Which axes may have other sizes than in the example; by default the first of every input, the batch.

    Raises:
        ExportError: The model decides in Python by its inputs' values, or fixes the size of one of the axes.
    """
    axes = batch_axes(inputs) if axes is None else axes
    shapes = [dict.fromkeys(axes.get(name, {}), Dim.DYNAMIC) for name in inputs]
    try:
        with evaluating(model), torch.no_grad(), recurrent_layers_captured():
            program = torch.export.export(model, tuple(inputs.values()), dynamic_shapes=by_argument(model, shapes))
    except Exception as error:  # of many kinds, from deep inside PyTorch's compiler
        refuse(model, "exported", error, _remedy(model, inputs, error))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names folders of this machine
    return program


def by_argument(model: nn.Module, values: Sequence[Any]) -> tuple[Any, ...]:
    """A value for each input, arranged as ``torch.export`` wants it: those of ``*args`` in a tuple of their own."""
    kinds = [parameter.kind for parameter in signature(model.forward).parameters.values()]
    if Parameter.VAR_POSITIONAL not in kinds or len(values) <= (first := kinds.index(Parameter.VAR_POSITIONAL)):
        return tuple(values)
    return (*values[:first], tuple(values[first:]))


def _remedy(model: nn.Module, inputs: Mapping[str, Tensor], error: Exception) -> str:
    """Say what to do about an error of ``torch.export``, as far as its kind tells."""
    try:
        with evaluating(model), torch.no_grad():
            model(*inputs.values())
    except Exception:
        return "it fails on these inputs even as it is"
    if any(frame.name == "_detect_is_causal_mask" for frame in traceback.extract_tb(error.__traceback__)):
        return (
            "give torch.nn's transformers is_causal=True (tgt_is_causal to decoders) along with a causal mask, so that "
            "they need not look into it"
        )
    if isinstance(error, GuardOnDataDependentSymNode):
        return "keep values of tensors out of Python's if, and take torch.where or torch.cond in its place"
    if "Constraints violated" in str(error):
        return "take sizes from tensor.shape, not len(), or keep them out of axes"
    return "torch.export says"


def load_program(path: StrPath, *, trust: bool = False) -> ExportedProgram:
    """Read an exported program (``.pt2``), which runs code of its author's; ``.module()`` of it is a module.

    Raises:
        UntrustedFileError: The caller does not say that it is trusted.
        ModelFileError: The file is missing, damaged or of another format.
    """
    path = Path(path)
    require_trust(path, require(path, FileKind.PT2), trust)
    with explaining_damage(path), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)  # torch 2.11's own
        return torch.export.load(path)


@contextmanager
def recurrent_layers_captured() -> Iterator[None]:
    """torch.nn.RNN, LSTM and GRU make torch.export warn of what it does with them itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"The tensor attributes? self\..*_flat_weights", UserWarning)
        warnings.filterwarnings("ignore", "_check_is_size will be removed", FutureWarning)
        yield
