"""Folders of data with links, hidden folders, names of any bytes, and what cannot be read."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from image_files import make_folders, picture

from raytorch.config import ImagesData
from raytorch.errors import DataError
from raytorch.sources import open_source
from raytorch.sources.files import Root
from raytorch.sources.texts import Texts


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_folders(tmp_path, "train", {"cat": 2, "dog": 1})
    return tmp_path


def opened(root: Path) -> Any:
    return open_source(ImagesData(root=str(root), size=16), "train", training=False)


def names(root: Path, name: str) -> list[str]:
    return [file.name for file in Root(str(root)).find([name])]


def test_links_are_followed_but_not_in_circles(root: Path, tmp_path: Path) -> None:
    make_folders(root, "elsewhere", {"elk": 1})
    (root / "train/elk").symlink_to(root / "elsewhere/elk")
    (root / "train/dog/1.png").symlink_to(root / "train/cat/000.png")
    (root / "train/cat/all").symlink_to(root / "train")
    (root / "train/cat/itself").symlink_to(".")
    found = ["cat/000.png", "cat/001.png", "dog/000.png", "dog/1.png", "elk/000.png"]
    assert names(root, "train") == [f"train/{name}" for name in found]
    assert opened(root).facts["classes"] == ["cat", "dog", "elk"]


def test_hidden_folders_are_no_classes(root: Path, tmp_path: Path) -> None:
    for folder in ("train/.ipynb_checkpoints", "train/cat/.thumbs"):
        (root / folder).mkdir()
        picture(1).save(root / folder / "1.png")
    assert opened(root).labels.tolist() == [0, 0, 1]
    in_store = Root(f"local://{root}")  # by fsspec
    assert [file.name for file in in_store.find(["train"])] == names(root, "train")
    assert names(root, "train/.ipynb_checkpoints") == ["train/.ipynb_checkpoints/1.png"]


def test_folders_may_be_named_in_full_or_lie_beside_the_root(root: Path) -> None:
    inside = Root(str(root / "train/cat"))
    found = [*inside.find([str(root / "train/dog")]), *inside.find(["../dog"])]
    assert [file.name for file in found] == [f"{root}/train/dog/000.png", "../dog/000.png"]
    assert {inside.read(file.name) for file in found} == {(root / "train/dog/000.png").read_bytes()}


def test_a_link_to_what_is_not_there_is_told_if_it_is_asked_for(root: Path) -> None:
    (root / "train/cat/README").symlink_to("nowhere")
    os.mkfifo(root / "train/cat/pipe.png")
    assert len(opened(root)) == 3
    (root / "train/cat/2.png").symlink_to("nowhere")
    with pytest.raises(DataError) as caught:
        opened(root)
    assert str(caught.value) == f"{root}/train/cat/2.png: cannot be read: it is a link to what is not there"


def test_a_folder_that_cannot_be_read_is_told(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = os.scandir

    def refused(path: Any) -> Any:
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(DataError) as caught:
        opened(root)
    assert str(caught.value) == f"{root}/train/dog: cannot be read: Permission denied"


def test_names_may_be_of_any_bytes(root: Path) -> None:
    folder = root / "train" / os.fsdecode(b"f\xfcchs")
    folder.mkdir()
    (root / "train/cat/000.png").rename(folder / os.fsdecode(b"caf\xe9.png"))
    data = opened(root)
    assert data[2][0].shape == (16, 16, 3)
    assert json.loads(json.dumps(data.facts))["classes"] == data.classes == ["cat", "dog", os.fsdecode(b"f\xfcchs")]
    assert Texts(["größer", "caf\udce9"])[1] == "caf\udce9"


@pytest.mark.parametrize("labels", [["007", "07", "7", "10"], ["0", "00", "000", "1"]])
def test_classes_that_are_equal_as_numbers_have_an_order(tmp_path: Path, labels: list[str]) -> None:
    table = tmp_path / "train.csv"
    for turned in (labels, labels[::-1]):
        table.write_text("path,label\n" + "".join(f"a.png,{label}\n" for label in turned))
        data = open_source(ImagesData(root=str(tmp_path), train="train.csv"), "train", training=False)
        assert data.classes == labels
