"""Arrays in files, compared with what NumPy and safetensors read of them."""

import json
import pickle
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lone_runs import final, train, without_ray
from safetensors.torch import save_file

from raytorch.config import ArraysData
from raytorch.errors import DataError
from raytorch.sources import open_source

Data = dict[str, Any]


def made(rows: int = 30, seed: int = 0) -> Data:
    rng = np.random.default_rng(seed)
    return {"x": rng.standard_normal((rows, 2, 3)).astype(np.float32), "y": rng.integers(0, 7, rows)}


def write(path: Path, data: Data) -> None:
    """In the format that the name says; a folder has an .npy file for each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npz":
        np.savez(path, **data)
    elif path.suffix == ".safetensors":
        save_file({name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in data.items()}, path)
    else:
        path.mkdir()
        for name, array in data.items():
            np.save(path / f"{name}.npy", array)


def opened(root: Path, split: str = "train", **keys: Any) -> Any:
    return open_source(ArraysData(root=str(root), **keys), split, training=True)


@pytest.mark.parametrize("kinds", [["a"], ["a.npz"], ["a.safetensors"], ["a", "b.npz", "c.safetensors", "d"]])
def test_files_and_folders_are_joined_one_after_the_other(tmp_path: Path, kinds: list[str]) -> None:
    parts = [made(10 + number, seed=number) for number in range(len(kinds))]
    for kind, data in zip(kinds, parts, strict=True):
        write(tmp_path / "train" / kind, data)
    arrays = opened(tmp_path, train=[f"train/{kind}" for kind in kinds], test=0.1)
    x, y = (np.concatenate([part[name] for part in parts]) for name in ("x", "y"))
    indices = torch.from_numpy(np.random.default_rng(0).integers(0, len(x), 200))
    for each in (arrays, pickle.loads(pickle.dumps(arrays))):
        found = each.batch(indices)
        assert [tensor.dtype for tensor in found] == [torch.float32, torch.int64]
        assert np.array_equal(found[0], x[indices])
        assert np.array_equal(found[1], y[indices])
    assert len(arrays) == len(x)
    assert arrays.blocks.tolist() == [len(part["x"]) for part in parts]
    assert arrays.labels.tolist() == y.tolist()
    assert arrays.facts == {"input_shape": [2, 3], "num_classes": int(y.max()) + 1}


def test_a_folder_of_folders_is_all_of_them(tmp_path: Path) -> None:
    for number, name in enumerate(("train/2.npz", "train/1/more", "train/0")):
        write(tmp_path / name, made(5, seed=number))
    found = opened(tmp_path, test=0.1)
    # The files of a folder come before those of the folders in it.
    assert found.labels.tolist() == np.concatenate([made(5, seed=seed)["y"] for seed in (0, 2, 1)]).tolist()
    assert found.blocks.tolist() == [5, 5, 5]


def test_all_splits_have_the_classes_of_the_training_split(tmp_path: Path) -> None:
    write(tmp_path / "train.npz", made() | {"y": np.arange(30) % 5})
    write(tmp_path / "test.npz", made() | {"y": np.arange(30) % 3})
    for split in ("train", "test"):
        assert opened(tmp_path, split, train="train.npz", test="test.npz").facts["num_classes"] == 5


@pytest.mark.parametrize("labels", [np.arange(30) - 1, np.arange(30.0), np.zeros((30, 1), np.int64)])
def test_a_field_that_is_no_number_of_a_class_gives_no_classes(tmp_path: Path, labels: Any) -> None:
    write(tmp_path / "train.npz", made() | {"y": labels})
    assert "num_classes" not in opened(tmp_path, train="train.npz", test=0.1).facts


@pytest.mark.parametrize("kind", ["bfloat16", "float8_e4m3fn", "float16", "float64", "uint8", "int16", "bool"])
def test_numbers_of_every_kind_are_as_safetensors_has_them(tmp_path: Path, kind: str) -> None:
    x = (torch.randn(12, 5, generator=torch.Generator().manual_seed(0)) * 9).to(getattr(torch, kind))
    save_file({"x": x, "y": torch.arange(12)}, tmp_path / "train.safetensors", {"made": "here"})
    found, _ = opened(tmp_path, train="train.safetensors", test=0.1).batch(torch.tensor([3, 0, 11]))
    assert found.dtype == x.dtype
    assert torch.equal(found.float(), x[[3, 0, 11]].float())


@pytest.mark.parametrize("name", ["train", "train.npz"])
def test_any_order_of_bytes_and_of_entries_is_read(tmp_path: Path, name: str) -> None:
    x = np.asfortranarray(np.arange(60).reshape(30, 2), dtype=">i4")
    write(tmp_path / name, {"x": x, "y": np.arange(30)})
    found, _ = opened(tmp_path, train=name, test=0.1).batch(torch.tensor([29, 4]))
    assert found.tolist() == [[58, 59], [8, 9]]


@pytest.mark.parametrize("name", ["train", "train.npz", "train.safetensors"])
def test_numbers_stay_in_the_file_until_they_are_asked_for(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, made() | {"x": np.full(30, 0.5)})
    arrays = opened(tmp_path, train=name, test=0.1)
    file = tmp_path / name / "x.npy" if name == "train" else tmp_path / name
    changed = file.read_bytes().replace(struct.pack("<d", 0.5), struct.pack("<d", 2.0))
    with file.open("r+b") as opened_again:
        opened_again.write(changed)
    assert arrays.batch(torch.tensor([7]))[0].tolist() == [2.0]


@pytest.mark.parametrize("name", ["train", "train.npz"])
def test_arrays_that_are_no_fields_may_be_anything(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, made() | {"names": np.array(["a"] * 30), "mean": np.array(3.0), "some": np.zeros(7)})
    assert len(opened(tmp_path, train=name, test=0.1)) == 30


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def safetensors_header(path: Path, **tensor: Any) -> None:
    text = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | tensor}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("cut/x.npy", r"cut/x.npy: cut short: expected 720 bytes of float32 \[30, 2, 3\] from byte 128 on, found 72$"),
        ("cut/y.npy", r"cut/y.npy: expected an .npy file, whole and undamaged: "),
        ("open/x.npy", r"open/x.npy: expected an .npy file, whole and undamaged: "),
        ("cut.npz", "cut.npz: expected an .npz file, whole and undamaged: "),
        ("zipped.npz", "zipped.npz: x: is compressed, and cannot be memory-mapped; write it by np.savez"),
        ("cut.safetensors", r"cut.safetensors: x: cut short: expected 720 bytes of float32 \[30, 2, 3\] from byte "),
        ("long.safetensors", "long.safetensors: expected a .safetensors file, .*: its header would be of 1,000,000,0"),
        ("other.safetensors", "other.safetensors: x: expected numbers of .*, found 'F4'$"),
        ("less.safetensors", r"less.safetensors: x: cut short: expected -8 bytes of float32 \[-2\] from byte "),
        ("before.safetensors", r"before.safetensors: x: expected offsets of at least 0, found \[-8, 0\]"),
        ("list.safetensors", "list.safetensors: expected a .safetensors file, whole and undamaged: "),
        ("deep.safetensors", "deep.safetensors: expected a .safetensors file, whole and undamaged: "),
        ("header/x.npy", "header/x.npy: expected an .npy file, whole and undamaged: "),
        ("newer.npz", "newer.npz: expected an .npz file, whole and undamaged: "),
        ("long_doubles", f"long_doubles/x.npy: expected an array of numbers, found one of {np.dtype(np.longdouble)}"),
        ("objects", "objects/x.npy: expected an array of numbers, found one of objects, which would have to be unpick"),
        ("texts", "texts/x.npy: expected an array of numbers, found one of <U1"),
        ("single.npz", "single.npz: y: expected an array with an entry for each sample, found a single number"),
        ("uneven.npz", "uneven.npz: expected as many entries in each array, found that x has 30, y has 29"),
        (
            ["good.npz", "wide"],
            r"wide: expected entries of float32 \[2, 3\] in x, as in .*good.npz, found float32 \[9\]",
        ),
        (["good.npz", "long"], r"long: expected entries of int64 \[\] in y, as in .*good.npz, found int32 \[\]"),
        ("more.npz", "more.npz: expected y, for data.fields, found x, z"),
        ("note.txt", "note.txt: expected arrays, of a name that ends with .npy, .npz, .safetensors"),
    ],
)
def test_what_is_not_in_order_is_told(tmp_path: Path, name: str | list[str], told: str) -> None:
    for good in ("cut", "cut.npz", "cut.safetensors", "good.npz"):
        write(tmp_path / good, made())
    cut(tmp_path / "cut/x.npy", 200)
    cut(tmp_path / "cut/y.npy", 20)
    (tmp_path / "open").mkdir()
    header = b"{'descr': '<f8', 'shape': (4, 3), ".ljust(118)  # without its end
    (tmp_path / "open/x.npy").write_bytes(b"\x93NUMPY\1\0\x77\0" + header + b"\n")
    cut(tmp_path / "cut.npz", 900)
    cut(tmp_path / "cut.safetensors", 1000)
    np.savez_compressed(tmp_path / "zipped.npz", **made())
    (tmp_path / "long.safetensors").write_bytes(struct.pack("<Q", 10**9) + b"{}")
    safetensors_header(tmp_path / "other.safetensors", dtype="F4")
    safetensors_header(tmp_path / "less.safetensors", shape=[-2])
    safetensors_header(tmp_path / "before.safetensors", data_offsets=[-8, 0])
    for name_of, header in (("list", b"[1]"), ("deep", b"[" * 100_000)):
        (tmp_path / f"{name_of}.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    write(tmp_path / "header", made())
    damaged = (tmp_path / "header/x.npy").read_bytes().replace(b"), }", b"), (")
    (tmp_path / "header/x.npy").write_bytes(damaged)
    write(tmp_path / "newer.npz", made())
    newer = bytearray((tmp_path / "newer.npz").read_bytes())
    newer[newer.rfind(b"PK\1\2") + 6] = 0xFF  # the version that is needed to read it
    (tmp_path / "newer.npz").write_bytes(newer)
    write(tmp_path / "long_doubles", made() | {"x": np.zeros(30, np.longdouble)})
    write(tmp_path / "objects", made() | {"x": np.array([None] * 30)})
    write(tmp_path / "texts", made() | {"x": np.array(["a"] * 30)})
    write(tmp_path / "single.npz", made() | {"y": np.array(3)})
    write(tmp_path / "uneven.npz", made() | {"y": np.arange(29)})
    write(tmp_path / "wide", made() | {"x": np.zeros((30, 9), np.float32)})
    write(tmp_path / "long", made() | {"y": np.arange(30, dtype=np.int32)})
    write(tmp_path / "more.npz", {"x": made()["x"], "z": made()["y"]})
    (tmp_path / "note.txt").write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match=told) as caught:
        opened(tmp_path, train=name, test=0.1)
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_the_run_of_the_documentation_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/files.md").read_text(encoding="utf-8")
    shown = re.search(r"^## Arrays\n.*?```yaml\n(.*?)```", page, re.DOTALL | re.MULTILINE)
    assert shown
    run = yaml.safe_load(shown[1])
    write(tmp_path / "spectra/january.npz", made())
    with without_ray(tmp_path, monkeypatch):
        trained = train("shown", run["model"], data=run["data"] | {"root": "spectra"}, epochs=run["epochs"])
    assert final(trained)["1.weight"].shape == (256, 6)
