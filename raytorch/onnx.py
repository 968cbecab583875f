"""ONNX graphs: exporting a model, checking a file, running it in onnxruntime, and comparing it with the model.

An ONNX file runs no code of its author's, but it may keep weights in other files and name these by any path; those
outside its own folder are refused before anything opens them.

Example:
    >>> export(nn.Linear(2, 3), {"input": torch.ones(4, 2)}, "linear.onnx")
    >>> load("linear.onnx").run(torch.ones(4, 2))[0].shape
    (4, 3)
"""

import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePath
from typing import Any, Self

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # else onnxruntime, once imported, reports to its maker

import numpy as np
import torch
from torch import Tensor, nn

from raytorch.errors import ExportError, ModelFileError, UserError, needing_extra
from raytorch.serialization import capture
from raytorch.serialization.comparison import TOLERANCE, Axes, Difference, batch_axes, fresh_inputs, require_agreement
from raytorch.serialization.exported_programs import by_argument, recurrent_layers_captured
from raytorch.serialization.file_kinds import FileKind, require
from raytorch.serialization.refusals import StrPath

with needing_extra("onnx"):
    import onnx
    import onnxruntime
    from google.protobuf.message import DecodeError

FIRST_OPSET = 18
"""The oldest opset that PyTorch's exporter writes."""

_SILENT = 4  # above onnxruntime's errors: these are raised


def export(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    path: StrPath,
    *,
    axes: Axes | None = None,
    outputs: Sequence[str] | None = None,
    opset: int | None = None,
) -> None:
    """Write a model, in evaluation mode, as an ONNX graph; weights beyond 2 GB go to ``<path>.data`` beside it.

    Args:
        model: The model.
        inputs: An example of each input by name, in the order of the model's arguments, two samples or more.
        path: File to write.
        axes: Which axes may have other sizes than in the example; by default the first of every input, the batch.
        outputs: Names of the outputs; by default those that PyTorch chooses.
        opset: Version of ONNX's operators; by default the one that PyTorch recommends.

    Raises:
        ExportError: The model cannot be captured, or has an operation that the opset cannot express.
    """
    if opset is not None and opset < FIRST_OPSET:
        raise ExportError(f"opset {opset} is too old for PyTorch's exporter; expected {FIRST_OPSET} or newer")
    with needing_extra("onnx"):
        import onnxscript  # noqa: F401 - PyTorch's exporter imports it late
    axes = batch_axes(inputs) if axes is None else axes
    program = capture(model, inputs, axes)
    try:
        with _quiet_exporter(), torch.no_grad():
            exported = torch.onnx.export(
                program,
                tuple(inputs.values()),
                dynamic_shapes=by_argument(model, [axes.get(name, {}) for name in inputs]),
                input_names=list(inputs),
                output_names=outputs,
                opset_version=opset,
                verbose=False,
            )
    except (torch.onnx.OnnxExporterError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:1000]
        raise ExportError(f"{type(model).__name__} cannot be exported to ONNX; try another opset: {reason}") from error
    assert exported is not None
    version = exported.model.opset_imports[""]
    if opset not in (None, version):
        raise ExportError(
            f"opset {opset} is not one that PyTorch can convert {type(model).__name__} to; expected {version}, as it "
            "has been exported, or another one"
        )
    exported.save(path)


def check(path: StrPath) -> None:
    """Check that a file is a complete and valid ONNX graph, with ONNX's own checker and shape inference.

    Raises:
        ModelFileError: It is missing, damaged, invalid, of another format, or has data outside its folder.
    """
    path = Path(path)
    _read(path)
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:500]
        raise ModelFileError(f"{path} is no valid ONNX graph ({reason}); export it again") from None


def load(path: StrPath, *, threads: int = 0, providers: Sequence[str] = ("CPUExecutionProvider",)) -> "OnnxModel":
    """Read an ONNX graph into onnxruntime.

    Args:
        path: The graph's file.
        threads: Threads for one operation; 0 takes a thread for each core.
        providers: What onnxruntime computes with, the best first; see ``onnxruntime.get_available_providers()``.

    Raises:
        ModelFileError: It is missing, damaged, of another format, has data outside its folder, or is made of operators
            that onnxruntime does not have.
    """
    path = Path(path)
    _read(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = _SILENT
    options.add_session_config_entry("session.load_model_format", "ONNX")  # whatever its name ends with
    with _explaining(f"{path} cannot be loaded by onnxruntime {onnxruntime.__version__}", ModelFileError):
        return OnnxModel(path, onnxruntime.InferenceSession(path, options, providers=list(providers)))


def verify(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    path: StrPath,
    *,
    axes: Axes | None = None,
    tolerance: float = TOLERANCE,
) -> list[Difference]:
    """Compare a graph with the model that it came from, on fresh inputs of two batch sizes.

    Args:
        model: The model, on the CPU.
        inputs: As for :func:`export`.
        path: The graph's file.
        axes: As for :func:`export`.
        tolerance: Largest relative error of an output: the largest difference by the output's largest magnitude.

    Raises:
        ExportError: An output differs by more, or in shape.
        ModelFileError: See :func:`load`.
    """
    trials = fresh_inputs(inputs, batch_axes(inputs) if axes is None else axes)
    with load(path) as graph:
        return require_agreement(model, graph.run, trials, tolerance=tolerance, names=graph.outputs)


class OnnxModel:
    """A graph in onnxruntime; as a context manager it frees it at the end of the block.

    Attributes:
        path: The graph's file.
        inputs: Names of the inputs, in order.
        outputs: Names of the outputs, in order.
    """

    def __init__(self, path: Path, session: onnxruntime.InferenceSession) -> None:
        self.path = path
        self.inputs = [node.name for node in session.get_inputs()]
        self.outputs = [node.name for node in session.get_outputs()]
        self._session: onnxruntime.InferenceSession | None = session

    def run(self, *inputs: Any) -> list[Any]:
        """Compute all outputs, as numpy arrays, or as lists of them where the graph has sequences.

        Args:
            inputs: A tensor or array for each input, in order, of the dtype that the graph states; trailing inputs
                that the graph calls optional may be left out.

        Raises:
            UserError: The inputs are not what the graph takes, or the graph cannot be computed with them.
        """
        if self._session is None:
            raise UserError(f"{self.path} was freed; load it again to run it")
        if len(inputs) > len(self.inputs):
            raise UserError(
                f"{self.path} takes {len(self.inputs)} inputs ({', '.join(self.inputs)}), not {len(inputs)}"
            )
        with _explaining(f"{self.path} cannot be run with these inputs", UserError):
            feeds = dict(zip(self.inputs, map(_as_array, inputs), strict=False))
            outputs: list[Any] = self._session.run(None, feeds)
        return outputs

    def free(self) -> None:
        """Give the graph's memory back; it cannot be run any more."""
        self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.free()


def _as_array(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.numpy(force=True)
    return np.asarray(value) if isinstance(value, np.generic) else value


@contextmanager
def _explaining(what: str, kind: type[UserError]) -> Iterator[None]:
    """Name what onnxruntime could not do; its exceptions have no class in common but Exception."""
    try:
        yield
    except Exception as error:
        raise kind(f"{what}: {' '.join(str(error).split())[:500]}") from None


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep back the exporter's remarks on its own rewriting; what fails is raised."""
    with ExitStack() as restoring, recurrent_layers_captured():
        for logger in map(logging.getLogger, ("onnxscript", "onnx_ir", "torch.onnx")):
            restoring.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        # One name for an axis that several inputs share is what was asked for.
        warnings.filterwarnings("ignore", "# The axis name: .* will not be used", UserWarning)
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)  # torch 2.11's own
        yield


def _read(path: Path) -> None:
    """Refuse what is no ONNX file, or names data outside its own folder."""
    require(path, FileKind.ONNX)
    try:
        graph = onnx.load(path, format="protobuf", load_external_data=False)  # whatever its name ends with
    except DecodeError as error:
        raise ModelFileError(f"{path} is a damaged ONNX graph ({error}); export it again") from None
    for tensor in _tensors(graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_external(path, tensor)


def _check_external(path: Path, tensor: onnx.TensorProto) -> None:
    """Check that a tensor's data are in a file of the graph's folder, or below it, and reached by no link."""
    said = {entry.key: entry.value for entry in tensor.external_data}
    told = f"{path} keeps tensor {tensor.name!r:.99} in {said.get('location')!r:.200}"
    folder, place = path.resolve().parent, PurePath(said.get("location", ""))
    if place.is_absolute() or ".." in place.parts:
        raise ModelFileError(f"{told}, outside its folder; expected a file in {folder}; nothing of it was read")
    target = folder / place
    if "\0" in str(place) or not target.is_file() or target.resolve() != target:
        raise ModelFileError(f"{told}, which is a link or no file; expected a plain file in {folder}; copy it there")
    try:
        offset, length = int(said.get("offset", 0)), int(said.get("length", 0))
    except ValueError:
        raise ModelFileError(f"{told} at no number; expected a whole offset and length; export it again") from None
    size = target.stat().st_size
    if min(offset, length) < 0 or offset + length > size:
        raise ModelFileError(
            f"{told}, {length:,} bytes from {offset:,} on; expected a part of its {size:,} bytes; export it again"
        )


def _tensors(message: Any) -> Iterator[onnx.TensorProto]:
    """Every tensor of a graph, wherever it is: initializers, attributes, subgraphs, functions."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for part in value if hasattr(value, "add") else [value]:  # repeated, or one
            if isinstance(part, onnx.TensorProto):
                yield part
            else:
                yield from _tensors(part)
