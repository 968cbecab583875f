"""What is written as safetensors can be read again, to the last bit, or is refused before anything is written.

RAYTORCH_TEST_HANDLES is how many handles a session saves, by default 3,000; 30,000 take half a minute.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process import local_session
from saved_states import save_state
from torch import Tensor, nn

from raytorch.config import MlpModel
from raytorch.errors import ModelFileError, RemoteOpError
from raytorch.models.networks import Architecture
from raytorch.serialization import load_tensors, nested_state, savable, save_model, save_tensors, whole_models
from raytorch.session import module_outline
from raytorch.session import save as snapshot


def test_thirty_thousand_small_tensors_come_back(tmp_path: Path) -> None:
    tensors = {f"tensor/{number}": torch.tensor([float(number)]) for number in range(30_000)}
    save_tensors(tensors, tmp_path / "many.safetensors")
    found = load_tensors(tmp_path / "many.safetensors")
    assert found.keys() == tensors.keys()
    assert found["tensor/29999"].item() == 29_999


def test_thousands_of_handles_come_back(tmp_path: Path) -> None:
    session = local_session()
    kept = [session.ones(1) for _ in range(int(os.environ.get("RAYTORCH_TEST_HANDLES", "3000")))]
    session.save(tmp_path / "saved")
    other = local_session()
    other.restore(tmp_path / "saved")
    assert len(other.handles()) == len(kept)
    assert other.get(kept[-1].handle).item() == 1


@pytest.mark.parametrize("metadata", [None, {"é": '"\n'}])
def test_a_header_is_no_longer_than_was_thought_before_it_was_written(
    tmp_path: Path, metadata: dict[str, str] | None
) -> None:
    path = tmp_path / "m.safetensors"
    tensors = {"é\n": torch.zeros(2, 3), "b": torch.zeros((), dtype=torch.bfloat16), "c": torch.zeros(0)}
    save_tensors(tensors, path, metadata)
    length = int.from_bytes(path.read_bytes()[:8], "little")
    assert length <= savable._longest_header(tensors, metadata) <= length + 40


def test_a_header_that_could_not_be_read_again_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(savable, "LONGEST_HEADER", 100)
    with pytest.raises(ModelFileError, match="at most 100 can be read again: save fewer"):
        save_tensors({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "new.safetensors")
    with pytest.raises(ModelFileError, match="can be read again"):
        save_state({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path)
    session = local_session()
    kept = [session.ones(1), session.ones(1)]
    with pytest.raises(RemoteOpError, match="can be read again"):
        session.save(tmp_path / "saved")
    assert kept[0].item() == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_state_that_could_not_be_read_again_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nested_state, "LARGEST_STRUCTURE", 100)
    with pytest.raises(ModelFileError, match="at most 100 can be read again"):
        save_state({"a": "x" * 100, "b": torch.zeros(1)}, tmp_path)
    assert not [*tmp_path.iterdir()]


def test_a_model_that_could_not_be_read_again_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = Architecture(MlpModel(hidden=[4]), (1, 2, 2), 3)
    monkeypatch.setattr(whole_models, "_MOST_TENSORS", 3)
    with pytest.raises(ModelFileError, match="would have 4 tensors"):
        save_model(architecture.build(), tmp_path / "m.safetensors", architecture)
    assert not [*tmp_path.iterdir()]


def test_a_module_that_could_not_be_restored_is_told_to_be_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (module_outline, snapshot):
        monkeypatch.setattr(module, "MOST_LEVELS", 2, raising=False)
    session = local_session()
    flat = session.module(nn.Sequential, session.module(nn.ReLU))
    deep = session.module(nn.Sequential, flat)
    assert session.save(tmp_path / "saved") == [deep.handle]


CONTENT = torch.tensor([[1 + 2j, 3 - 4j], [5j, 6]], dtype=torch.complex64)
VIEWS: dict[str, Any] = {
    "conjugated": lambda: {"a": CONTENT.conj()},
    "negated": lambda: {"a": torch._neg_view(CONTENT.real.contiguous())},
    "transposed": lambda: {"a": CONTENT.T},
    "conjugated and transposed": lambda: {"a": CONTENT.mH},
    "twice": lambda: {"a": CONTENT, "b": CONTENT},
    "overlapping": lambda: {"a": CONTENT, "b": CONTENT[1], "c": CONTENT[:, 1]},
    "empty": lambda: {"a": CONTENT[:0], "b": CONTENT[:, :0]},
    "requiring grad": lambda: {"a": torch.ones(2, requires_grad=True)},
}


@pytest.mark.parametrize("name", VIEWS)
def test_tensors_come_back_whatever_they_are_views_of(tmp_path: Path, name: str) -> None:
    tensors: dict[str, Tensor] = VIEWS[name]()
    save_tensors(tensors, tmp_path / "m.safetensors")
    found = load_tensors(tmp_path / "m.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)


REFUSED: dict[str, tuple[Any, str]] = {
    "complex128": (lambda: torch.zeros(2, dtype=torch.complex128), r"torch.complex128: save torch.view_as_real\(\)"),
    "complex32": (lambda: torch.zeros(2, dtype=torch.complex32), "view_as_real"),
    "sparse": (lambda: torch.eye(2).to_sparse(), r"sparse_coo tensor: save its to_dense\(\)"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "dequantize"),
    "meta": (lambda: torch.ones(2, device="meta"), "no content yet"),
    "lazy": (lambda: nn.LazyLinear(2).weight, "no content yet"),
    "no tensor": (lambda: 3, "a int: give tensors alone"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_what_such_a_file_cannot_hold_is_refused_with_what_to_do(tmp_path: Path, name: str) -> None:
    make, told = REFUSED[name]
    with pytest.raises(ModelFileError, match=told):
        save_tensors({"a": make()}, tmp_path / "m.safetensors")
    assert not [*tmp_path.iterdir()]
