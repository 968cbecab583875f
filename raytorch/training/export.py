"""Exporting a trained model: each format is written, read again, compared with the model, and only then given its name.

What is exported is the model's call: an image's or a clip's logits; of seq2seq the logits of each target, given the
image and the targets before it. The batch may have any size, and so may the targets' length.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from inspect import signature
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch
from torch import Tensor, nn

from raytorch import serialization
from raytorch.config.export_formats import ExportFormat
from raytorch.errors import ExportError, RaytorchError, Remedy, RunNotFoundError, UserError
from raytorch.models.networks import Architecture, Code, require_known_inputs
from raytorch.runs.checkpoint_manifest import THE_MODEL, latest_checkpoint, model_names, read_manifest
from raytorch.runs.local_folder import LOCK_FILE, LocalFolder
from raytorch.runs.plan import require_code_elsewhere
from raytorch.runs.storage import RunFolder
from raytorch.serialization.comparison import Axes, Difference, batch_axes, evaluating, fresh_inputs, require_agreement
from raytorch.serialization.llama import load_llama, save_llama
from raytorch.system.deletion import delete_tree
from raytorch.system.near_names import did_you_mean
from raytorch.training.saved_state import model_of_checkpoint

SUFFIXES: dict[ExportFormat, str] = {
    "onnx": ".onnx",
    "torchscript": ".pt",
    "pt2": ".pt2",
    "safetensors": ".safetensors",
    "hf": "-hf",
}
"""Behind the name of a model; of a folder for ``hf``."""
_OUTPUTS = ["logits"]
logger = logging.getLogger("raytorch")


def require_packages(kinds: Sequence[ExportFormat]) -> None:
    """Raise MissingPackageError for formats that cannot be written here, before anything is trained for them."""
    if "onnx" in kinds:
        import raytorch.onnx  # noqa: F401


def export_run(
    folder: RunFolder,
    kind: ExportFormat,
    path: Path,
    *,
    verify: bool = True,
    code: Code = None,
    model: str | None = None,
) -> list[Difference]:
    """Export a model in a run's latest checkpoint. Raises as :func:`load_run` and :func:`export_model` do."""
    return export_model(*load_run(folder, code, model), kind, path, verify=verify)


def load_run(folder: RunFolder, code: Code = None, model: str | None = None) -> tuple[nn.Module, Architecture]:
    """A model in a run's latest checkpoint, on the CPU, and what it was built from.

    ``model`` is its name, by default that of the only one, or of several ``model``.

    Raises:
        UserError: There is no model of that name, or nothing says which of several.
        RunNotFoundError: The run has no complete checkpoint.
        ModelFileError: The checkpoint's weights are damaged, or do not say of which model they are.
    """
    name = latest_checkpoint(folder)
    if name is None:
        raise RunNotFoundError(
            f"{folder} has no complete checkpoint to export; resume it", remedies=[Remedy("resume", str(folder))]
        )
    chosen = _chosen(model, model_names(read_manifest(folder, name).files), folder)
    with model_of_checkpoint(folder, name, chosen) as path:
        architecture = serialization.read_architecture(path, code=code)
        require_code_elsewhere(architecture.code, folder)
        return serialization.load_model(path, code=architecture.code), architecture


def _chosen(model: str | None, there: list[str], folder: RunFolder) -> str:
    """The name of the model that is meant among those that are there."""
    chosen = model or (there[0] if len(there) == 1 else THE_MODEL)
    if chosen in there or not there:  # of a damaged checkpoint, whose reader says what is missing
        return chosen
    near = did_you_mean(chosen, there) if model else ""
    raise UserError(f"{folder} has no model {chosen}; give one of {', '.join(there)}{near}", remedies=[Remedy("model")])


def export_finished(
    model: nn.Module, architecture: Architecture, kinds: Sequence[ExportFormat], folder: Path, name: str = THE_MODEL
) -> list[dict[str, Any]]:
    """Write the model of a run that has finished into ``folder`` in each of several formats; see :func:`export_model`.

    Returns of each what ``summary.json`` tells: its format, its place in the run's folder, how far it is off.
    """
    exports: list[dict[str, Any]] = []
    for kind in kinds:
        path = folder / f"{name}{SUFFIXES[kind]}"
        try:
            (difference,) = export_model(model, architecture, kind, path)
        except ExportError as error:
            raise ExportError(
                f"the training finished and its model is saved, but not exported as {kind}: {error}"
            ) from error
        exports.append({"format": kind, "file": f"{folder.name}/{path.name}", "relative_error": difference.relative})
        logger.info("exported %s, %s", path.name, difference)
    return exports


def export_model(
    model: nn.Module, architecture: Architecture, kind: ExportFormat, path: Path, *, verify: bool = True
) -> list[Difference]:
    """Write a model to ``path`` for use elsewhere.

    Args:
        model: The model, on the CPU.
        architecture: What it was built from.
        kind: The format.
        path: The file to write, or to replace; appears only once it is complete and, with ``verify``, compared. For
            ``hf`` a folder, of which the same holds for each file.
        verify: Whether to read the file again and compare it with the model on inputs of two batch sizes.

    Returns:
        How far the file's outputs are from the model's; empty without ``verify``.

    Raises:
        ExportError: The model cannot be exported, or the export differs from it.
        UserError: ``path`` cannot be written.

    Example:
        >>> architecture = read_architecture("model.safetensors")
        >>> export_model(load_model("model.safetensors"), architecture, "pt2", Path("model.pt2"))
    """
    inputs, axes = example(model, architecture)
    with _appearing(path) as partial:
        _write(model, architecture, kind, partial, inputs, axes)
        if not verify:
            return []
        if kind == "onnx":
            from raytorch import onnx

            onnx.check(partial)
            return onnx.verify(model, inputs, partial, axes=axes)
        again = _READERS[kind](partial, architecture)
        return require_agreement(model, again, fresh_inputs(inputs, axes), names=_OUTPUTS)


def example(model: nn.Module, architecture: Architecture) -> tuple[dict[str, Tensor], Axes]:
    """Random inputs by name for a model of this architecture, two samples of each, and their changeable axes.

    A model's class may bring its own: ``axes``, and a method ``example_inputs``, which may take the input's shape.
    Otherwise it reads images. Raises UserError if nothing says what it reads.
    """
    require_known_inputs(model, architecture)
    make, shape = getattr(model, "example_inputs", None), architecture.input_shape
    with torch.random.fork_rng(devices=[]):
        if make is None:
            inputs = {"images": torch.randn(2, *(shape or ()))}
        else:
            inputs = make(shape) if signature(make).parameters else make()
    return inputs, getattr(type(model), "axes", batch_axes(inputs))


def _write(
    model: nn.Module,
    architecture: Architecture,
    kind: ExportFormat,
    path: Path,
    inputs: Mapping[str, Tensor],
    axes: Axes,
) -> None:
    if kind == "onnx":
        from raytorch import onnx

        onnx.export(model, inputs, path, axes=axes, outputs=_OUTPUTS)
    elif kind == "torchscript":
        with evaluating(model):
            serialization.script(model).save(str(path))
    elif kind == "pt2":
        torch.export.save(serialization.capture(model, inputs, axes), path)
    elif kind == "hf":
        save_llama(model, path, architecture)
    else:
        serialization.save_model(model, path, architecture)


_READERS: dict[ExportFormat, Callable[[Path, Architecture], Callable[..., Any]]] = {
    "torchscript": lambda path, _: serialization.load_torchscript(path, trust=True),  # this module wrote them
    "pt2": lambda path, _: serialization.load_program(path, trust=True).module(),
    "safetensors": lambda path, architecture: serialization.load_model(path, code=architecture.code),
    "hf": load_llama,
}


@contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """A path of the same name in a folder beside ``path``, which takes its place when the block ends well."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _staging(path.parent) as staging:
            yield staging / path.name
            for file in sorted(staging.glob(f"{path.name}*"), reverse=True):  # model.onnx.data before model.onnx
                _put(file, path.parent / file.name)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}; give another path", remedies=[Remedy("out")]
        ) from None


def _put(made: Path, path: Path) -> None:
    """Give a file its name, or each file of a folder its own in that: what else is there stays."""
    if not made.is_dir():
        made.replace(path)
        return
    if path.is_symlink():  # which a file would replace as well
        path.unlink()
    path.mkdir(exist_ok=True)
    for file in sorted(made.iterdir(), reverse=True):  # the weights before what says how they are read
        file.replace(path / file.name)


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A new folder in ``folder``, held for as long as it is needed; those that nobody holds any more are deleted."""
    for lock in folder.glob(f".export-{'[0-9a-f]' * 16}/{LOCK_FILE}"):  # of exports that were killed, if not under way
        with suppress(OSError, RaytorchError), LocalFolder(str(lock.parent)).locked():
            delete_tree(lock.parent)
    name = f"export-{token_hex(8)}"
    made, staging = folder / f".new-{name}", folder / f".{name}"
    made.mkdir()
    with LocalFolder(str(made)).locked():
        made.rename(staging)  # found by others from now on, when it is held
        try:
            yield staging
        finally:
            delete_tree(staging)
