"""Files that are not what they say: each gives one clear error, runs and writes nothing, and takes little memory."""

import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

import raytorch.onnx
from raytorch.config import MlpModel, VitModel
from raytorch.errors import ConfigError, ModelFileError, UntrustedFileError
from raytorch.models.networks import Architecture
from raytorch.serialization import (
    capture,
    load_model,
    load_program,
    load_state,
    load_torchscript,
    load_weights,
    save_model,
    script,
)
from raytorch.serialization.whole_models import require_loadable

MLP = Architecture(MlpModel(hidden=[4]), (1, 2, 2), 3)
LIMIT = 2**29


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.trace}",)


def refused(read: Callable[[Path], Any], path: Path) -> str:
    """The one line with which reading a file is refused, having changed nothing in its folder."""
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(ModelFileError) as failure:
        read(path)
    assert sorted(path.parent.rglob("*")) == before
    told = str(failure.value)
    assert told.startswith(f"{path} ")
    assert "\n" not in told
    return told


# -- pickles -----------------------------------------------------------------------------------------------------------

PICKLES: dict[str, Callable[[Any, Path], None]] = {
    "protocol 0": lambda content, path: path.write_bytes(pickle.dumps(content, 0)) and None,
    "protocol 4": lambda content, path: path.write_bytes(pickle.dumps(content, 4)) and None,
    "torch.save": lambda content, path: torch.save(content, path),
    "torch.save of old": lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".onnx"])
@pytest.mark.parametrize("form", PICKLES)
def test_a_pickle_is_refused_whatever_its_name(tmp_path: Path, form: str, suffix: str) -> None:
    path, trace = tmp_path / f"model{suffix}", tmp_path / "was-here"
    PICKLES[form]({"weight": torch.ones(2), "more": Hostile(trace)}, path)
    for read in (load_weights, load_state, load_model, raytorch.onnx.load, raytorch.onnx.check):
        told = refused(read, path)
        found = "a file that torch.save wrote" if form == "torch.save" else "a bare pickle, which could run commands"
        if form == "torch.save" and read in (load_weights, load_state):
            assert "names posix.system, which is no tensor and could run code; expected tensors by name" in told
        else:
            assert told.startswith(f"{path} is {found}; expected ")
    assert not trace.exists()


def test_a_packed_state_dict_is_refused(tmp_path: Path) -> None:
    plain, path = tmp_path / "plain.pt", tmp_path / "packed.pt"
    torch.save({"weight": torch.zeros(10**6)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in source.infolist():
            packed.writestr(entry.filename, source.read(entry))
    assert "would unpack to 4," in refused(load_weights, path)


def test_a_state_dict_has_tensors_only(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    torch.save({"model": {"weight": torch.ones(2)}}, path)
    assert "holds a dict as 'model'; expected a state dict" in refused(load_weights, path)
    torch.save([torch.ones(2)], path)
    assert "holds a list; expected a state dict" in refused(load_weights, path)


# -- what can hold code ------------------------------------------------------------------------------------------------


def test_torchscript_is_read_only_with_trust(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    script(MLP.build()).save(str(path))
    with pytest.raises(UntrustedFileError) as failure:
        load_torchscript(path)
    assert str(failure.value) == (
        f"{path} is a TorchScript program, which can run code of its author's as soon as it is read; pass trust=True "
        "if you know where it comes from, or ask for the model as safetensors"
    )
    assert load_torchscript(path, trust=True)(torch.ones(2, 1, 2, 2)).shape == (2, 3)
    assert "is a TorchScript program; expected a safetensors file or a file that torch.save wrote; read it with" in (
        refused(load_weights, path)
    )


def test_an_exported_program_is_read_only_with_trust(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    torch.export.save(capture(MLP.build(), {"images": torch.ones(2, 1, 2, 2)}), path)
    with pytest.raises(UntrustedFileError, match=r"is an exported program.*pass trust=True"):
        load_program(path)
    assert "expected a TorchScript program; read it with raytorch.serialization.load_program" in (
        refused(lambda path: load_torchscript(path, trust=True), path)
    )
    assert b"/torch/nn/" not in path.read_bytes()  # where on this machine the code lay


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" + bytes(90), b"hello", bytes(64), b"\x08\x0a:\x00"])
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    for read in (load_weights, load_model, load_torchscript, load_program, raytorch.onnx.load, raytorch.onnx.check):
        refused(read, path)


def test_what_is_not_there_or_is_no_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # would be waited for
    for read in (load_weights, load_model, load_state, load_torchscript, load_program, raytorch.onnx.load):
        for path in (tmp_path / "none.pt", tmp_path / "pipe", tmp_path):
            with pytest.raises(ModelFileError, match=r"no such file|cannot be read: (it is n|N)ot a (file|directory)"):
                read(path)


def test_an_archive_of_a_zip_yet_to_come_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"a": torch.zeros(2)}, path)
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 6] = 99  # the version that reading its first entry takes
    path.write_bytes(content)
    for read in (load_weights, load_state, load_model, load_torchscript, load_program):
        assert "is a zip archive that is damaged" in refused(read, path)


# -- safetensors -------------------------------------------------------------------------------------------------------


def tensor(shape: list[Any], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


LIES: dict[str, tuple[Any, int, str]] = {
    "offsets beyond the file": (
        {"a": tensor([64], 0, 256)},
        16,
        "tensor 'a' ends at byte 256 of its data; expected at",
    ),
    "overlap": ({"a": tensor([4], 0, 16), "b": tensor([4], 8, 24)}, 24, "tensor 'b' overlaps the one before it"),
    "gap": ({"a": tensor([2], 0, 8), "b": tensor([2], 16, 24)}, 24, "tensor 'b' leaves a gap before it"),
    "shape": ({"a": tensor([3, 3], 0, 16)}, 16, "tensor 'a' of shape [3, 3] has 16 bytes; expected 36"),
    "huge shape": ({"a": tensor([2**40, 2**40], 0, 16)}, 16, "tensor 'a' of shape"),
    "negative": ({"a": tensor([-4], 16, 0)}, 16, "tensor 'a' has impossible sizes"),
    "too many dimensions": ({"a": tensor([1] * 65, 0, 4)}, 4, "tensor 'a' has impossible sizes"),
    "no numbers": ({"a": tensor(["4"], 0, 16)}, 16, "tensor 'a' has impossible sizes"),
    "dtype": ({"a": tensor([4], 0, 16, "F31")}, 16, "tensor 'a' is not described"),
    "no entry": ({"a": 5}, 16, "tensor 'a' is not described"),
    "left over": ({"a": tensor([4], 0, 16)}, 20, "20 bytes follow the header; expected the 16 that its tensors take"),
}


def safetensors(path: Path, header: Any, data: int, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data))
    return path


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_safetensors_header_is_refused(tmp_path: Path, lie: str) -> None:
    header, data, told = LIES[lie]
    path = safetensors(tmp_path / "model.safetensors", header, data)
    for read in (load_weights, load_model):
        assert f"is damaged: {told}" in refused(read, path)


@pytest.mark.parametrize("length", [200, 5 * 2**20, 2**63, 2**64 - 1])
def test_a_huge_safetensors_header_is_refused(tmp_path: Path, length: int) -> None:
    path = safetensors(tmp_path / "model.safetensors", {"a": tensor([4], 0, 16)}, 16, length)
    assert f"its header claims {length:,} bytes; expected at most " in refused(load_weights, path)


@pytest.mark.parametrize("header", [b"{" * 9999, b"{}}", b'{"a": ' + b"[" * 9999, b'{"__metadata__": 5}'])
def test_a_safetensors_header_that_is_no_json_is_refused(tmp_path: Path, header: bytes) -> None:
    assert "is damaged: its header is not" in refused(load_weights, safetensors(tmp_path / "m.safetensors", header, 4))


ARCHITECTURES: dict[str, tuple[str, str]] = {
    "no JSON": ("{", "its architecture cannot be built"),
    "unknown model": ('{"config": {"name": "gpt"}, "input_shape": [1, 2, 2], "num_classes": 3}', "its architecture"),
    "other sizes": (
        '{"config": {"name": "mlp", "hidden": [5]}, "input_shape": [1, 2, 2], "num_classes": 3}',
        "is of shape (4,), not of shape (5,)",
    ),
    "endless layers": (
        '{"config": {"name": "vit", "layers": 1000000000}, "input_shape": [1, 8, 8], "num_classes": 3}',
        "4 tensors are too few for 1000000000 layers",
    ),
    "endless width": (
        '{"config": {"name": "mlp", "hidden": [1000000000000]}, "input_shape": [1, 2, 2], "num_classes": 3}',
        "not of shape (1000000000000,)",
    ),
    "impossible input": ('{"config": {"name": "convnet"}, "input_shape": [9], "num_classes": 3}', "its architecture"),
}


@pytest.mark.parametrize("lie", ARCHITECTURES)
def test_an_architecture_that_the_weights_are_not_of_is_refused(tmp_path: Path, lie: str) -> None:
    text, told = ARCHITECTURES[lie]
    path = tmp_path / "model.safetensors"
    save_file(MLP.build().state_dict(), path, {"raytorch": text})
    assert told in refused(load_model, path)


def test_weights_that_are_no_numbers_to_train_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({name: each.int() for name, each in MLP.build().state_dict().items()}, path, {"raytorch": MLP.to_json()})
    assert "tensor '1.bias' is of torch.int32, which cannot be trained" in refused(load_model, path)


def test_constants_beyond_measure_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    config = VitModel(patch=4, dim=8, heads=2, feedforward=8, layers=1)
    model = Architecture(config, (1, 8, 8), 3).build()
    save_model(model, path, Architecture(config, (1, 80_000, 80_000), 3))
    assert "buffers that are not saved with it (persistent=False), of 12,800,000,000 bytes" in refused(load_model, path)
    large = Architecture(config, (1, 80_000, 80_000), 3)
    with (
        torch.device("meta"),
        pytest.raises(ConfigError, match=r"vit could not be loaded again: it would have buffers"),
    ):
        require_loadable(large.build(), large)  # before it is trained


def test_weights_without_an_architecture_are_told_from_models(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(2)}, path)
    assert "has weights but does not say of which model" in refused(load_model, path)
    assert torch.equal(load_weights(path)["weight"], torch.ones(2))


# -- ONNX --------------------------------------------------------------------------------------------------------------


def graph(path: Path, location: str, length: int = 16, offset: int = 0, nested: bool = False) -> Path:
    """An ONNX file that adds to its input 4 floats which it keeps in another file."""
    weight = numpy_helper.from_array(np.ones(4, np.float32), "w")
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": offset, "length": length}.items():
        weight.external_data.add(key=key, value=str(value))
    nodes, weights = [helper.make_node("Add", ["x", "w"], ["y"])], [weight]
    if nested:
        nodes, weights = [helper.make_node("Constant", [], ["w"], value=weight), *nodes], []
    shape = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
    body = helper.make_graph(nodes, "g", shape[:1], shape[1:], weights)
    path.write_bytes(
        helper.make_model(body, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]).SerializeToString()
    )
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder for a model, beside which lies a file that is none of its business."""
    (tmp_path / "secret").write_bytes(bytes(64))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link").symlink_to("../secret")
    (folder / "up").symlink_to("..")
    (folder / "data").write_bytes(np.ones(4, np.float32).tobytes())
    return folder


@pytest.mark.parametrize("nested", [False, True], ids=["initializer", "attribute"])
@pytest.mark.parametrize(
    ("location", "told"),
    [
        ("{folder}/../secret", "outside its folder"),
        ("../secret", "outside its folder"),
        ("x/../../secret", "outside its folder"),
        ("link", "which is a link or no file"),
        ("up/secret", "which is a link or no file"),
        ("none", "which is a link or no file"),
        ("", "which is a link or no file"),
        ("/dev/zero", "outside its folder"),
    ],
)
def test_onnx_data_outside_the_folder_are_refused(folder: Path, location: str, told: str, nested: bool) -> None:
    path = graph(folder / "model.onnx", location.format(folder=folder), nested=nested)
    for read in (raytorch.onnx.load, raytorch.onnx.check):
        assert told in refused(read, path)


@pytest.mark.parametrize(("offset", "length"), [(0, 2**40), (8, 16), (2**62, 16), (-16, 16)])
def test_onnx_data_beyond_their_file_are_refused(folder: Path, offset: int, length: int) -> None:
    path = graph(folder / "model.onnx", "data", length, offset)
    assert "expected a part of its 16 bytes" in refused(raytorch.onnx.load, path)


def test_onnx_data_in_the_folder_are_read(folder: Path) -> None:
    path = graph(folder / "model.onnx", "data")
    raytorch.onnx.check(path)
    with raytorch.onnx.load(path) as model:
        (found,) = model.run(torch.ones(4))
    assert found.tolist() == [2, 2, 2, 2]


def test_an_onnx_graph_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    nodes = [helper.make_node("Nonsense", ["x"], ["y"])]
    shape = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", shape[:1], shape[1:])), path)
    assert "is no valid ONNX graph" in refused(raytorch.onnx.check, path)
    assert "cannot be loaded by onnxruntime" in refused(raytorch.onnx.load, path)


# -- memory ------------------------------------------------------------------------------------------------------------

MEASURE = """
import re, sys
from pathlib import Path
import raytorch.onnx
from raytorch.errors import ModelFileError
from raytorch.serialization import load_model, load_weights
def peak():  # getrusage's ru_maxrss counts what the parent had when it forked
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
imported = peak()  # how much the libraries take is up to the machine
reads = {"weights": load_weights, "model": load_model, "onnx": raytorch.onnx.load}
for read, path in (argument.split("=", 1) for argument in sys.argv[1:]):
    try:
        reads[read](path)
        print("accepted", path)
    except ModelFileError:
        print("refused", path)
print(peak() - imported)
"""


def test_hostile_files_take_less_than_half_a_gigabyte(folder: Path, tmp_path: Path) -> None:
    sparse = safetensors(tmp_path / "sparse.safetensors", b"{", 0, 90 * 10**6)
    os.truncate(sparse, 2**32)
    hidden = {"config": {"name": "mlp", "hidden": [1] * 12_000}, "input_shape": [1, 1, 1], "num_classes": 1}
    metadata = {"__metadata__": {"raytorch": json.dumps(hidden)}}
    tensors = {str(number): tensor([0], 0, 0) for number in range(25_000)}
    many = safetensors(tmp_path / "many.safetensors", metadata | tensors, 0)
    most = {str(number): tensor([0], 0, 0) for number in range(180_000)}
    longest = safetensors(tmp_path / "longest.safetensors", metadata | most, 0)
    nested = safetensors(tmp_path / "nested.safetensors", b'{"a":[' + b"{}," * (2**22 - 4) + b"{}]}", 0)
    deep = safetensors(tmp_path / "deep.safetensors", metadata | {"a": tensor([0], 0, 0)}, 0)
    files = [
        f"weights={safetensors(tmp_path / 'huge.safetensors', {}, 0, 2**62)}",
        f"weights={sparse}",
        f"model={many}",
        f"model={longest}",
        f"weights={nested}",
        f"model={deep}",
        f"onnx={graph(folder / 'zero.onnx', '/dev/zero', 2**40)}",
        f"onnx={graph(folder / 'long.onnx', 'data', 2**40)}",
    ]
    result = subprocess.run([sys.executable, "-c", MEASURE, *files], capture_output=True, text=True, check=True)
    *lines, growth = result.stdout.splitlines()
    assert [line.partition(" ")[0] for line in lines] == ["refused"] * len(files)
    assert int(growth) < LIMIT, f"{int(growth):,} bytes"
