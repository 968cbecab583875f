"""Folders in folders, deeper than Python recurses, than a process may open files, and than a path may be long."""

import os
import resource
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from raytorch.errors import PackageError
from raytorch.runs.catalog import list_runs
from raytorch.runs.checkpoint_manifest import latest_checkpoint
from raytorch.runs.storage import RunFolder
from raytorch.service.projects import collect_files
from raytorch.system import temporary_folders
from raytorch.system.deletion import delete_tree

LEVELS = 1100


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A folder that goes, whatever is in it: pytest itself does not get rid of such a thing."""
    yield tmp_path
    subprocess.run(["rm", "-rf", *tmp_path.iterdir()], check=True)


def fill(folder: Path, levels: int = LEVELS, name: str = "d") -> None:
    """Make folders in each other, and in each a file and an empty folder."""
    folder.mkdir(parents=True)
    at = os.open(folder, os.O_RDONLY)
    for _ in range(levels):
        os.close(os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=at))
        os.mkdir("empty", 0o500, dir_fd=at)
        os.mkdir(name, dir_fd=at)
        inner = os.open(name, os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = inner
    os.close(at)


@pytest.mark.parametrize("name", ["d", "a name that makes a path of more than 4,096 bytes"])
def test_a_deep_folder_is_deleted_from_a_run(root: Path, name: str) -> None:
    folder = RunFolder(str(root), "mine")
    fill(root / "mine" / "checkpoint_00000005", name=name)
    (root / "mine" / "config.yaml").touch()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, limit[1]), limit[1]))
    try:
        assert latest_checkpoint(folder) is None
        folder.delete("checkpoint_00000005")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert [path.name for path in (root / "mine").iterdir()] == ["config.yaml"]
    assert [run["name"] for run in list_runs(str(root))] == ["mine"]


def test_a_deep_temporary_folder_is_deleted(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(temporary_folders.tempfile, "gettempdir", lambda: str(root))
    with temporary_folders.temporary_folder() as path:
        (path / "file").touch()
    assert not path.exists()
    abandoned = path.with_name("999999999-1-" + path.name.split("-", 2)[2])
    fill(abandoned / "deep")
    temporary_folders.delete_abandoned.cache_clear()
    temporary_folders.delete_abandoned()
    assert not abandoned.exists()


@pytest.mark.skipif(os.getuid() == 0, reason="root may delete anything")
def test_what_cannot_be_deleted_is_told_and_the_rest_goes(root: Path) -> None:
    fill(root / "top", 3)
    (root / "top" / "held" / "in").mkdir(parents=True)
    (root / "top" / "held" / "in" / "file").touch()
    (root / "top" / "held").chmod(0o500)
    with pytest.raises(PermissionError):
        delete_tree(root / "top")
    assert [path.name for path in (root / "top").iterdir()] == ["held"]
    (root / "top" / "held").chmod(0o700)


def test_what_links_in_it_lead_to_stays(root: Path) -> None:
    (root / "precious").mkdir()
    (root / "precious" / "file").touch()
    (root / "top" / "in").mkdir(parents=True)
    for place in ("top/link", "top/in/link"):
        (root / place).symlink_to(root / "precious")
    delete_tree(root / "top")
    assert [path.name for path in root.iterdir()] == ["precious"]
    assert (root / "precious" / "file").exists()
    (root / "link").symlink_to(root / "precious")
    with pytest.raises(OSError, match="link"):
        delete_tree(root / "link")
    assert (root / "precious" / "file").exists()


def test_a_deep_project_is_sent_or_refused_in_one_sentence(root: Path) -> None:
    fill(root / "project")
    (root / "project" / "train.py").touch()
    try:
        assert len(collect_files(root / "project").files) == LEVELS + 1
    except PackageError as error:
        assert "nested too deeply" in str(error)  # noqa: PT017 - Python 3.12 and later walk without recursion


def test_a_long_chain_of_links_is_refused_in_one_sentence(root: Path) -> None:
    folders = [root / str(number) for number in range(LEVELS // 2)]
    for folder in folders:
        folder.mkdir()
    for folder, target in pairwise(folders):
        (folder / "next").symlink_to(f"../{target.name}")
    (folders[-1] / "train.py").touch()
    with pytest.raises(PackageError, match="nested too deeply"):
        collect_files(root)
