"""Whole models in files: their weights as safetensors, with the architecture that rebuilds them."""

import os
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from raytorch.errors import ConfigError, ModelFileError, Remedy
from raytorch.models.networks import Architecture, Code
from raytorch.serialization.refusals import StrPath
from raytorch.serialization.saved_tensors import SavedTensors, open_tensors
from raytorch.serialization.weights import save_tensors
from raytorch.system.python_files import ProjectError

METADATA_KEY = "raytorch"
"""Where a safetensors file's metadata has the model's architecture, as JSON."""
_LARGEST_CONSTANTS = 64 * 2**20
"""Bytes that a shipped model may hold beside its weights, however small these are; most have kilobytes."""
_CONSTANTS_PER_BYTE = 16
"""Bytes that it may hold besides for each of its file's."""
_MOST_TENSORS = 25_000
"""Tensors of a model at most: each layer that is outlined takes far more memory than its line in a file's header."""
_UNBUILT = (ConfigError, RuntimeError, ValueError, TypeError, AssertionError, OverflowError)
"""What is raised where a model cannot be built."""


def save_model(model: nn.Module, path: StrPath, architecture: Architecture) -> None:
    """Write a model's weights and buffers as safetensors, with the ``architecture`` that :func:`load_model` builds.

    Raises:
        ModelFileError: It has more of them than could be read again; nothing is written then.
    """
    path, state = Path(path), model.state_dict()
    save_tensors(state, path, model_metadata(len(state), path, architecture))


def model_metadata(tensors: int, path: Path, architecture: Architecture) -> dict[str, str]:
    """What a file of :func:`save_model` says of its model, of so many tensors. Raises ModelFileError for too many."""
    if tensors > _MOST_TENSORS:
        raise ModelFileError(
            f"{path} would have {tensors:,} tensors, and a model that can be read again has at most "
            f"{_MOST_TENSORS:,}: write them with save_tensors; nothing was written"
        )
    return {METADATA_KEY: architecture.to_json()}


def require_loadable(model: nn.Module, architecture: Architecture) -> None:
    """Refuse, before it is trained, a model that :func:`load_model` would refuse. Raises ConfigError.

    Example:
        >>> require_loadable(architecture.build(), architecture)
    """
    state = model.state_dict()
    if len(state) > _MOST_TENSORS:
        raise ConfigError(
            f"model.name: {architecture.config.name} makes a model of {len(state):,} tensors, and one that can be "
            f"loaded again has at most {_MOST_TENSORS:,}; join some of them, as torch.stack does, or train it in a "
            "loop of your own, which gives run.model the module itself"
        )
    nbytes = sum(tensor.nbytes for tensor in state.values())
    if problem := _constants_problem(model, architecture, nbytes):
        raise ConfigError(
            f"model.name: {architecture.config.name} could not be loaded again: it would have {problem}; take smaller "
            "inputs, or a model of your own"
        )


def load_model(path: StrPath, device: torch.device | str = "cpu", *, code: Code = None) -> nn.Module:
    """The model that :func:`save_model` wrote, in evaluation mode; a run's checkpoints have one, too.

    Args:
        path: The file.
        device: Where its weights go.
        code: Of a model of your own the file or folder that has its code, of which the model's file has the digests
            alone: a file of weights never runs code that you have not named.

    Raises:
        ModelFileError: The file is missing, damaged, of another format, or its weights are not its architecture's; or
            it is of other code than that.
    """
    path = Path(path)
    with open_tensors(path) as tensors:
        architecture = _described(path, tensors, code)
        _check_fit(path, tensors, architecture)
        with torch.random.fork_rng(devices=[]):
            model = architecture.build()
        # Not copied into the model's own, which would change their dtype.
        model.load_state_dict(_weights_of(path, model, tensors), assign=True)
    return model.to(device).eval()


def read_architecture(path: StrPath, *, code: Code = None) -> Architecture:
    """Read what a file of :func:`save_model` says of its model; ``code`` is as for :func:`load_model`.

    Raises:
        ModelFileError: It says nothing, or what no model can be built from.
    """
    with open_tensors(Path(path)) as tensors:
        return _described(Path(path), tensors, code)


def _weights_of(path: Path, model: nn.Module, tensors: SavedTensors) -> dict[str, Tensor]:
    """The tensors as the model is to have them: one for all names of what it has under several, unless they differ."""
    weights: dict[str, Tensor] = {}
    shared: dict[int, Tensor] = {}
    own = model.state_dict(keep_vars=True)
    for name, saved in tensors.items():
        weight, tensor = shared.get(id(own[name])), saved.read()
        if weight is None or not torch.equal(weight, tensor):
            weight = shared[id(own[name])] = _in_place_of(path, name, own[name], tensor)
        weights[name] = weight
    return weights


def _in_place_of(path: Path, name: str, own: Tensor, tensor: Tensor) -> Tensor:
    if not isinstance(own, nn.Parameter):
        return tensor
    if own.requires_grad and not (tensor.is_floating_point() or tensor.is_complex()):
        raise _unfit(path, f"tensor {name!r:.99} is of {tensor.dtype}, which cannot be trained")
    return nn.Parameter(tensor, own.requires_grad)


def _described(path: Path, tensors: SavedTensors, code: Code) -> Architecture:
    """The architecture that a file names."""
    text = tensors.files[0].metadata.get(METADATA_KEY)
    if not isinstance(text, str):
        raise ModelFileError(
            f"{path} has weights but does not say of which model; expected a file that save_model or a run wrote; "
            "build the model yourself and give it load_weights(path)"
        )
    try:
        return Architecture.from_json(text, code)
    except ProjectError as error:
        raise ModelFileError(f"{path} cannot be built: {error}", remedies=[Remedy("code")]) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise _unfit(path, f"its architecture cannot be built: {where}: {first['msg']}"[:300]) from None


def _check_fit(path: Path, tensors: SavedTensors, architecture: Architecture) -> None:
    """Check, before memory is taken, that the architecture's weights are those in the file."""
    there = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(there) > _MOST_TENSORS:
        raise _unfit(path, f"{len(there):,} tensors are more than the {_MOST_TENSORS:,} that a model has")
    fields = {} if architecture.code else architecture.config.model_dump()
    depths = [len(value) for value in fields.values() if isinstance(value, list)]
    depths += [value for name, value in fields.items() if name.endswith("layers")]
    if max(depths, default=0) > len(there):  # each layer has weights
        raise _unfit(path, f"{len(there)} tensors are too few for {max(depths)} layers")
    try:
        outline = _outline(architecture)
    except _UNBUILT as error:
        raise _unfit(path, f"its architecture cannot be built: {str(error).partition(chr(10))[0]}"[:300]) from None
    expected = {name: tuple(tensor.shape) for name, tensor in outline.state_dict().items()}
    for name in sorted(expected.keys() | there.keys()):
        if expected.get(name) != there.get(name):
            raise _unfit(path, f"tensor {name!r:.99} is {_shape(there.get(name))}, not {_shape(expected.get(name))}")
    _check_constants(path, outline, architecture, sum(tensor.nbytes for tensor in tensors.values()))


def _check_constants(path: Path, outline: nn.Module, architecture: Architecture, nbytes: int) -> None:
    """Check what the buffers take that are in no file."""
    if problem := _constants_problem(outline, architecture, nbytes):
        raise ModelFileError(
            f"{path} cannot be loaded: its model has {problem}; make them persistent, compute them where they are "
            "used, or build the model yourself and give it load_weights(path)"
        )


def _constants_problem(model: nn.Module, architecture: Architecture, nbytes: int) -> str | None:
    """What is wrong with the buffers that are not among the ``nbytes`` of weights.

    A file of weights says how large those of a shipped model are, and may be anybody's; code of a user's own holds what
    it is meant to, on a machine that can.
    """
    saved = model.state_dict().keys()
    sizes = {name: each.nbytes for name, each in model.named_buffers() if name not in saved}
    total, most = sum(sizes.values()), _LARGEST_CONSTANTS + _CONSTANTS_PER_BYTE * nbytes
    if architecture.code:
        most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if total <= most:
        return None
    largest = max(sizes, key=lambda name: sizes[name])
    held = "this machine's memory has" if architecture.code else f"with weights of {nbytes:,} bytes it can have"
    return (
        f"buffers that are not saved with it (persistent=False), of {total:,} bytes, {largest!r:.99} the largest, and "
        f"{held} {most:,}"
    )


def _outline(architecture: Architecture) -> nn.Module:
    """The model, if it can be without memory; code of a user's own may compute with tensors while it makes one."""
    try:
        return architecture.build(torch.device("meta"))
    except _UNBUILT:
        if not architecture.code:
            raise
    with torch.random.fork_rng(devices=[]):
        return architecture.build()


def _unfit(path: Path, found: str) -> ModelFileError:
    return ModelFileError(
        f"{path} does not fit the architecture that it names: {found}; expected a file that save_model or a run wrote"
    )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else f"of shape {shape}"
