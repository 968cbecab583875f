"""Tensors in pieces over several files: any part is read from any division, no more than is needed, or is refused."""

import json
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from raytorch.config import MlpModel
from raytorch.errors import ModelFileError
from raytorch.models.networks import Architecture
from raytorch.serialization import load_model, load_tensors, load_weights, read_architecture, save_tensors
from raytorch.serialization.pieces import BLOCK, Piece, piece_path, whole, write_pieces
from raytorch.serialization.saved_tensors import open_tensors
from raytorch.serialization.whole_models import model_metadata

CONTENT = torch.arange(7 * 5 * 3, dtype=torch.float32).reshape(7, 5, 3)
GRIDS: dict[str, list[list[int]]] = {
    "rows": [[0, 3, 6, 7], [0, 5], [0, 3]],
    "columns": [[0, 7], [0, 2, 5], [0, 3]],
    "both": [[0, 4, 7], [0, 3, 5], [0, 3]],
    "one": [[0, 7], [0, 5], [0, 3]],
}


PARTS = [((0, 0, 0), (7, 5, 3)), ((2, 1, 1), (7, 3, 2)), ((6, 0, 0), (7, 5, 3)), ((3, 4, 0), (3, 5, 3))]


def write(path: Path, tensor: Tensor, grid: list[list[int]], name: str = "weight", save: str = "a") -> None:
    """Write a tensor as so many processes do it, of which each has a box of a grid."""
    boxes = list(product(*([*pairwise(cuts)] for cuts in grid)))
    for number, box in enumerate(boxes):
        part = tensor[tuple(slice(*span) for span in box)]
        piece = Piece(part, tuple(tensor.shape), tuple(begin for begin, _ in box))
        pieces = {name: piece} | ({"mean": whole(torch.tensor(0.5))} if number == 0 else {})
        write_pieces(pieces, piece_path(path, number, len(boxes)), save, {})


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64, torch.int64])
def test_any_part_is_read_from_any_division(tmp_path: Path, grid: str, dtype: torch.dtype) -> None:
    path, content = tmp_path / "model.safetensors", CONTENT.to(dtype)
    write(path, content, GRIDS[grid])
    with open_tensors(path) as tensors:
        saved = tensors["weight"]
        assert (saved.shape, saved.dtype, tensors["mean"].read().item()) == (content.shape, dtype, 0.5)
        for low, high in PARTS:
            sizes = [last - first for first, last in zip(low, high, strict=True)]
            expected = content[tuple(slice(*span) for span in zip(low, high, strict=True))]
            assert torch.equal(saved.read(low, sizes), expected)
    assert torch.equal(load_tensors(path)["weight"], content)
    assert torch.equal(load_weights(path)["weight"], content)


@pytest.mark.parametrize("shape", [(0,), (3, 0), ()])
def test_tensors_with_no_or_one_element_come_back(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = tmp_path / "model.safetensors"
    write_pieces({"a": whole(torch.ones(shape))}, path, "a", {})
    assert torch.equal(load_tensors(path)["a"], torch.ones(shape))


def test_every_reader_of_safetensors_reads_the_files(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write(path, CONTENT, GRIDS["rows"])
    for number, (begin, end) in enumerate(pairwise(GRIDS["rows"][0])):
        with safe_open(piece_path(path, number, 3), "pt") as file:
            assert torch.equal(file.get_tensor("weight"), CONTENT[begin:end])
            described = json.loads(file.metadata()["pieces"])["tensors"]["weight"]
            assert (described["shape"], described["offsets"]) == ([7, 5, 3], [begin, 0, 0])


def test_a_quarter_of_what_two_have_written_is_read_by_each_of_four(tmp_path: Path) -> None:
    path, rows = tmp_path / "model.safetensors", 1024
    content = {f"layer.{number}": torch.randn(rows, 512) for number in range(4)}
    for number in (0, 1):
        half = slice(number * 512, number * 512 + 512)
        pieces = {name: Piece(it[half], tuple(it.shape), (half.start, 0)) for name, it in content.items()}
        write_pieces(pieces, piece_path(path, number, 2), "a", {})
    nbytes = sum(file.stat().st_size for file in tmp_path.iterdir())
    for rank in range(4):
        with open_tensors(path) as tensors:
            for name, saved in tensors.items():
                found = saved.read([rank * 256, 0], [256, 512])
                assert torch.equal(found, content[name][rank * 256 : rank * 256 + 256])
            assert tensors.bytes_read <= 0.26 * nbytes


def test_each_flipped_bit_is_found_by_who_reads_the_block_and_by_nobody_else(tmp_path: Path) -> None:
    path, content = tmp_path / "m.safetensors", torch.randn(3, BLOCK // 4)
    write_pieces({"a": whole(content)}, path, "a", {})
    written = path.read_bytes()
    at = len(written) - BLOCK - 7  # in the second of three blocks
    path.write_bytes(written[:at] + bytes([written[at] ^ 4]) + written[at + 1 :])
    with open_tensors(path) as tensors:
        assert torch.equal(tensors["a"].read([0, 0], [1, BLOCK // 4]), content[:1])
        assert torch.equal(tensors["a"].read([2, 0], [1, BLOCK // 4]), content[2:])
        with pytest.raises(ModelFileError, match=r"m\.safetensors is damaged: tensor 'a' has not the content that its"):
            tensors["a"].read([1, 5], [1, 1])
        with pytest.raises(ModelFileError, match="is damaged"):
            tensors["a"].read()


LIES: dict[str, tuple[Any, str]] = {
    "beyond": (lambda it: it["offsets"].__setitem__(0, 6), "does not say of which part tensor 'weight' is, or lies"),
    "negative": (lambda it: it["offsets"].__setitem__(0, -1), "or lies"),
    "text": (lambda it: it["offsets"].__setitem__(0, "3"), "or lies"),
    "flat": (lambda it: it["offsets"].pop(), "or lies"),
    "no sums": (lambda it: it.pop("crc32"), "or lies"),
    "few sums": (lambda it: it.__setitem__("crc32", ""), "or lies"),
    "over another": (
        lambda it: it["offsets"].__setitem__(0, 2),
        "a part of tensor 'weight' is in another file",
    ),
    "larger": (lambda it: it.__setitem__("shape", [8, 5, 3]), r"of torch.float32 and shape \[8, 5, 3\], not of"),
    "huge": (lambda it: it.__setitem__("shape", [2**62, 5, 3]), "or lies"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(tmp_path: Path, lie: str) -> None:
    change, told = LIES[lie]
    path = tmp_path / "model.safetensors"
    write(path, CONTENT, GRIDS["rows"])
    file = piece_path(path, 1, 3)
    written = file.read_bytes()
    length = int.from_bytes(written[:8], "little")
    header = json.loads(written[8 : 8 + length])
    pieces = json.loads(header["__metadata__"]["pieces"])
    change(pieces["tensors"]["weight"])
    header["__metadata__"]["pieces"] = json.dumps(pieces)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + written[8 + length :])
    with pytest.raises(ModelFileError, match=told) as failure:
        load_tensors(path)
    assert "model-0000" in str(failure.value)


@pytest.mark.parametrize(
    "pieces", ["{", "[]", '{"save": 1, "tensors": {}}', '{"save": "a", "tensors": []}', '{"save": "a"}']
)
def test_pieces_that_are_no_such_json_are_refused(tmp_path: Path, pieces: str) -> None:
    header = json.dumps({"__metadata__": {"pieces": pieces}}).encode()
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ModelFileError, match="what it says of its pieces is no such JSON"):
        load_tensors(tmp_path / "m.safetensors")


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    path, other = tmp_path / "model.safetensors", tmp_path / "other.safetensors"
    write(path, CONTENT, GRIDS["rows"])
    write(other, CONTENT, GRIDS["rows"], save="b")
    last = piece_path(path, 2, 3)
    piece_path(other, 2, 3).replace(last)
    with pytest.raises(ModelFileError, match=r"model-00003-of-00003.safetensors is of another save than .*model-00001"):
        load_tensors(path)
    last.unlink()
    with pytest.raises(ModelFileError, match="of tensor 'weight' there are 90 of 105 elements, and the file"):
        load_tensors(path)


def test_files_of_another_program_that_are_not_all_there_are_refused(tmp_path: Path) -> None:
    """Those have no pieces: each has some of the tensors."""
    for number in (1, 2):
        save_tensors({f"weight.{number}": torch.ones(2)}, tmp_path / f"model-0000{number}-of-00002.safetensors")
    assert sorted(load_weights(tmp_path / "model.safetensors")) == ["weight.1", "weight.2"]
    assert [*load_weights(tmp_path / "model-00002-of-00002.safetensors")] == ["weight.2"]
    for name in ("model-00002-of-00002.safetensors", "model-00001-of-00002.safetensors"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        with pytest.raises(ModelFileError, match=r"is in several files, and of model-0000. .*|not all are there"):
            load_weights(tmp_path / "model.safetensors")
        (tmp_path / name).write_bytes(content)


def test_a_model_in_pieces_is_loaded_by_the_name_of_the_whole(tmp_path: Path) -> None:
    path, architecture = tmp_path / "model.safetensors", Architecture(MlpModel(hidden=[4]), (1, 2, 2), 3)
    model = architecture.build().eval()
    state = model.state_dict()
    for number in (0, 1):
        mine = [name for at, name in enumerate(state) if at % 2 == number]
        metadata = model_metadata(len(state), path, architecture)
        write_pieces({name: whole(state[name]) for name in mine}, piece_path(path, number, 2), "a", metadata)
    images = torch.randn(2, 1, 2, 2)
    assert torch.equal(load_model(path)(images), model(images))
    assert read_architecture(path).input_shape == (1, 2, 2)
