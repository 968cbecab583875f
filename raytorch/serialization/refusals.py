"""Messages of a model's file that is damaged or not trusted, and of a model that cannot be exported."""

import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import NoReturn

from safetensors import SafetensorError
from torch import nn

from raytorch.errors import ExportError, ModelFileError, UntrustedFileError
from raytorch.serialization.file_kinds import FileKind

StrPath = str | PathLike[str]


def require_trust(path: Path, kind: FileKind, trust: bool) -> None:
    """Refuse a file that can run code, unless the caller trusts it. Raises UntrustedFileError."""
    if not trust:
        raise UntrustedFileError(
            f"{path} is {kind}, which can run code of its author's as soon as it is read; pass trust=True if you know "
            "where it comes from, or ask for the model as safetensors"
        )


@contextmanager
def explaining_damage(path: Path) -> Iterator[None]:
    """Turn what reading a file fails with into a ModelFileError about it."""
    try:
        yield
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"names {named[1]}, which is no tensor and could run code" if named else "is damaged, or no state dict"
        raise ModelFileError(f"{path} {what}; expected tensors by name; nothing in it was run") from None
    except (SafetensorError, RuntimeError, ValueError, KeyError, EOFError, AssertionError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ModelFileError(f"{path} is damaged ({reason}); write it again, or fetch it again") from None


def refuse(model: nn.Module, done: str, error: Exception, remedy: str) -> NoReturn:
    """Raise the ExportError of a model that cannot be ``done``, from what PyTorch raised."""
    reason = " ".join(str(error).split())
    raise ExportError(f"{type(model).__name__} cannot be {done}; {remedy}: {reason[:1000]}") from error
