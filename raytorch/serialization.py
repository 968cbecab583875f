"""Models in files: as weights, with all that rebuilds them, as TorchScript, and as exported programs (.pt2).

Safetensors and state dicts hold numbers only. A TorchScript file and a ``.pt2`` can run code when they are read, so
reading one needs ``trust=True``. Where PyTorch's own object or function does it already, use that one:

- a TorchScript module is called, ``.eval()``-ed, ``.train()``-ed and ``.save(path)``-d like any module;
- ``torch.save(model.state_dict(), path)`` writes a state dict, ``torch.export.save(program, path)`` a ``.pt2``;
- ``program.module()`` of an exported program is a module again;
- ``del`` frees either of them, as nothing else holds on to it.
"""

import pickle
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import Parameter, signature
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.jit import ScriptModule

from raytorch.agreement import Axes, batch_axes, evaluating, unchanged
from raytorch.errors import ConfigError, ExportError, ModelFileError, UntrustedFileError
from raytorch.model_files import Kind, read_safetensors_header, require
from raytorch.models import Architecture
from raytorch.torch_files import refuse_bombs

METADATA_KEY = "raytorch"
"""Where a safetensors file's metadata has the model's architecture, as JSON."""

StrPath = str | PathLike[str]
_LARGEST_CONSTANTS = (
    64 * 2**20
)  # bytes that a model may hold beside its file's weights; the shipped ones have kilobytes
_architectures = TypeAdapter(Architecture)


# -- weights -----------------------------------------------------------------------------------------------------------


def load_weights(path: StrPath, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a state dict that ``torch.save`` wrote, by name.

    Nothing in the file is run, whatever it holds.

    Raises:
        ModelFileError: The file is missing, damaged, of another format, or holds more than tensors.
    """
    path = Path(path)
    if require(path, Kind.SAFETENSORS, Kind.STATE_DICT) == Kind.SAFETENSORS:
        return load_tensors(path, device)
    content = load_state(path, device)
    if not isinstance(content, dict):
        raise ModelFileError(f"{path} holds a {type(content).__name__}; expected a state dict, tensors by name")
    for name, value in content.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise ModelFileError(
                f"{path} holds a {type(value).__name__} as {name!r:.99}; expected a state dict, tensors by name; save "
                "model.state_dict() alone, or read the file with load_state"
            )
    return dict(content)


def load_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name. Raises ModelFileError as :func:`load_weights` does."""
    require(path, Kind.SAFETENSORS)
    read_safetensors_header(path)
    with _explaining_damage(path):
        return load_file(path, device=str(device))


def load_state(path: StrPath, device: torch.device | str = "cpu") -> Any:
    """What ``torch.save`` wrote, if it is made of tensors, plain values, lists and dicts.

    Nothing in the file is run, whatever it holds, and nothing is built that is larger than what it holds.

    Raises:
        ModelFileError: The file is missing, damaged, of another format, or holds anything else.
    """
    path = Path(path)
    require(path, Kind.STATE_DICT)
    refuse_bombs(path)
    with _explaining_damage(path), path.open("rb") as file:  # from the path torch.load would judge by its suffix
        return torch.load(file, map_location=device, weights_only=True)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, with the permissions that a new file has here."""
    path.touch()
    mode = path.stat().st_mode
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, metadata)
    path.chmod(mode)  # safetensors writes what only its owner can read


# -- whole models ------------------------------------------------------------------------------------------------------


def save_model(model: nn.Module, path: StrPath, architecture: Architecture) -> None:
    """Write a model's weights and buffers as safetensors, with the ``architecture`` that :func:`load_model` builds."""
    save_tensors(model.state_dict(), Path(path), {METADATA_KEY: _architectures.dump_json(architecture).decode()})


def load_model(path: StrPath, device: torch.device | str = "cpu") -> nn.Module:
    """The model that :func:`save_model` wrote, in evaluation mode; a run's checkpoints have one, too.

    Raises:
        ModelFileError: The file is missing, damaged, of another format, or its weights are not its architecture's.
    """
    path = Path(path)
    architecture = read_architecture(path)
    _check_fit(path, architecture)
    with torch.random.fork_rng(devices=[]):
        model = architecture.build()
    # As the file has them the tensors lie at odd addresses, where products are slower and their last bits others.
    weights = {name: tensor.clone() for name, tensor in load_weights(path).items()}
    model.load_state_dict(weights, assign=True)  # not copied into the model's own, which would change their dtype
    return model.to(device).eval()


def read_architecture(path: StrPath) -> Architecture:
    """What a file of :func:`save_model` says of its model.

    Raises:
        ModelFileError: It says nothing, or what no model can be built from.
    """
    path = Path(path)
    require(path, Kind.SAFETENSORS)
    text = read_safetensors_header(path).get("__metadata__", {}).get(METADATA_KEY)
    if not isinstance(text, str):
        raise ModelFileError(
            f"{path} has weights but does not say of which model; expected a file that save_model or a run wrote; "
            "build the model yourself and give it load_weights(path)"
        )
    try:
        return _architectures.validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise _unfit(path, f"its architecture cannot be built: {where}: {first['msg']}"[:300]) from None


def _check_fit(path: Path, architecture: Architecture) -> None:
    """Check, before memory is taken, that the architecture's weights are those in the file."""
    header = read_safetensors_header(path)
    there = {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    fields = architecture.config.model_dump()
    depths = [len(value) for value in fields.values() if isinstance(value, list)]
    depths += [value for name, value in fields.items() if name.endswith("layers")]
    if max(depths, default=0) > len(there):  # each layer has weights
        raise _unfit(path, f"{len(there)} tensors are too few for {max(depths)} layers")
    try:
        with torch.device("meta"):  # shapes without memory
            outline = architecture.build()
    except (ConfigError, RuntimeError, ValueError, TypeError, AssertionError, OverflowError) as error:
        raise _unfit(path, f"its architecture cannot be built: {str(error).partition(chr(10))[0]}"[:300]) from None
    expected = {name: tuple(tensor.shape) for name, tensor in outline.state_dict().items()}
    for name in sorted(expected.keys() | there.keys()):
        if expected.get(name) != there.get(name):
            raise _unfit(path, f"tensor {name!r:.99} is {_shape(there.get(name))}, not {_shape(expected.get(name))}")
    constants = sum(buffer.nbytes for name, buffer in outline.named_buffers() if name not in expected)
    if constants > _LARGEST_CONSTANTS:
        raise _unfit(path, f"its input_shape {architecture.input_shape} would take {constants:,} bytes of constants")


def _unfit(path: Path, found: str) -> ModelFileError:
    return ModelFileError(
        f"{path} does not fit the architecture that it names: {found}; expected a file that save_model or a run wrote"
    )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else f"of shape {shape}"


# -- TorchScript -------------------------------------------------------------------------------------------------------


def script(model: nn.Module) -> ScriptModule:
    """Compile a model to TorchScript with its control flow, and all methods marked ``torch.jit.export``.

    Raises:
        ExportError: The model uses Python that TorchScript does not know.
    """
    try:
        with _deprecated_on_purpose(), unchanged(model):
            return cast(ScriptModule, torch.jit.script(model))
    except (RuntimeError, NotImplementedError) as error:
        _refuse(model, "compiled to TorchScript", error, "trace it in its place")


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
        _refuse(model, "traced", error, "script it in its place, or give it other inputs")


def load_torchscript(path: StrPath, *, trust: bool = False, device: torch.device | str = "cpu") -> ScriptModule:
    """Read a TorchScript module, which runs code of its author's.

    Raises:
        UntrustedFileError: The caller does not say that it is trusted.
        ModelFileError: The file is missing, damaged or of another format.
    """
    path = Path(path)
    _require_trust(path, require(path, Kind.TORCHSCRIPT), trust)
    with _explaining_damage(path), _deprecated_on_purpose():
        return cast(ScriptModule, torch.jit.load(path, map_location=device))  # type: ignore[no-untyped-call]


@contextmanager
def _deprecated_on_purpose() -> Iterator[None]:
    """PyTorch calls TorchScript deprecated each time it is used; whoever called this module has chosen it."""
    with warnings.catch_warnings():
        # A FutureWarning in torch 2.15, a DeprecationWarning in 2.11.
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", Warning)
        yield


# -- exported programs -------------------------------------------------------------------------------------------------


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
        _refuse(model, "exported", error, _remedy(model, inputs, error))
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
    """What to do about an error of ``torch.export``, as far as its kind tells."""
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
    _require_trust(path, require(path, Kind.PT2), trust)
    with _explaining_damage(path), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)  # torch 2.11's own
        return torch.export.load(path)


@contextmanager
def recurrent_layers_captured() -> Iterator[None]:
    """torch.nn.RNN, LSTM and GRU make torch.export warn of what it does with them itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"The tensor attributes? self\..*_flat_weights", UserWarning)
        warnings.filterwarnings("ignore", "_check_is_size will be removed", FutureWarning)
        yield


# -- errors ------------------------------------------------------------------------------------------------------------


def _require_trust(path: Path, kind: Kind, trust: bool) -> None:
    if not trust:
        raise UntrustedFileError(
            f"{path} is {kind}, which can run code of its author's as soon as it is read; pass trust=True if you know "
            "where it comes from, or ask for the model as safetensors"
        )


@contextmanager
def _explaining_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"names {named[1]}, which is no tensor and could run code" if named else "is damaged, or no state dict"
        raise ModelFileError(f"{path} {what}; expected tensors by name; nothing in it was run") from None
    except (SafetensorError, RuntimeError, ValueError, KeyError, EOFError, AssertionError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ModelFileError(f"{path} is damaged ({reason}); write it again, or fetch it again") from None


def _refuse(model: nn.Module, done: str, error: Exception, remedy: str) -> NoReturn:
    reason = " ".join(str(error).split())
    raise ExportError(f"{type(model).__name__} cannot be {done}; {remedy}: {reason[:1000]}") from error
