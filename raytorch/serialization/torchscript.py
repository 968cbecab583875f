"""TorchScript: compiling and tracing a model, and reading the file of one."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule

from raytorch.serialization.comparison import evaluating, unchanged
from raytorch.serialization.file_kinds import FileKind, require
from raytorch.serialization.refusals import StrPath, explaining_damage, refuse, require_trust


def script(model: nn.Module) -> ScriptModule:
    """Compile a model to TorchScript with its control flow, and all methods marked ``torch.jit.export``.

    Raises:
        ExportError: The model uses Python that TorchScript does not know.
    """
    try:
        with _deprecated_on_purpose(), unchanged(model):
            return cast(ScriptModule, torch.jit.script(model))
    except (RuntimeError, NotImplementedError) as error:
        refuse(model, "compiled to TorchScript", error, "trace it in its place")


def trace(model: nn.Module, *inputs: Tensor) -> ScriptModule:
    """Record as TorchScript what a model computes for ``inputs``, in evaluation mode.

    What is decided in Python is decided once and for all, by ``inputs``; PyTorch warns of it.

    Raises:
        ExportError: The model fails on ``inputs``, or does more than can be recorded.
    """
    try:
        with _deprecated_on_purpose(), evaluating(model), torch.no_grad():
            return cast(ScriptModule, torch.jit.trace(model, inputs))  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError, TypeError) as error:
        refuse(model, "traced", error, "script it in its place, or give it other inputs")


def load_torchscript(path: StrPath, *, trust: bool = False, device: torch.device | str = "cpu") -> ScriptModule:
    """Read a TorchScript module, which runs code of its author's.

    Raises:
        UntrustedFileError: The caller does not say that it is trusted.
        ModelFileError: The file is missing, damaged or of another format.
    """
    path = Path(path)
    require_trust(path, require(path, FileKind.TORCHSCRIPT), trust)
    with explaining_damage(path), _deprecated_on_purpose():
        return cast(ScriptModule, torch.jit.load(path, map_location=device))  # type: ignore[no-untyped-call]


@contextmanager
def _deprecated_on_purpose() -> Iterator[None]:
    """PyTorch calls TorchScript deprecated each time it is used; whoever called this module has chosen it."""
    with warnings.catch_warnings():
        # A FutureWarning in torch 2.15, a DeprecationWarning in 2.11.
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", Warning)
        yield
