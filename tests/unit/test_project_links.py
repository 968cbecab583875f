"""Links in a project: sent as what they lead to, never with what is outside, and never without end."""

from pathlib import Path

import pytest
from project_files import git, make, packed

from raytorch.errors import PackageError
from raytorch.service import projects
from raytorch.service.projects import collect_files


@pytest.mark.parametrize("under_git", [False, True])
def test_a_link_is_sent_as_what_it_leads_to(tmp_path: Path, under_git: bool) -> None:
    make(tmp_path, "train.py", "lib/net.py", "lib/deep/block.py")
    for link, target in {
        "same.py": "train.py",
        "absolute.py": str(tmp_path / "train.py"),
        "again.py": "same.py",
        "net": "lib",
        "lib/deep/up.py": "../../train.py",
        "both": "net/deep",
    }.items():
        (tmp_path / link).symlink_to(target)
    if under_git:
        git(tmp_path, "init")
        git(tmp_path, "add", ".")
    deep = {"block.py": "lib/deep/block.py", "up.py": "train.py"}
    lib = {"net.py": "lib/net.py"} | {f"deep/{name}": content for name, content in deep.items()}
    assert packed(tmp_path) == (
        {"train.py": "train.py", "same.py": "train.py", "absolute.py": "train.py", "again.py": "train.py"}
        | {f"{folder}/{name}": content for folder in ("lib", "net") for name, content in lib.items()}
        | {f"both/{name}": content for name, content in deep.items()}
    )
    assert collect_files(tmp_path).left_out == []


@pytest.mark.parametrize("under_git", [False, True])
def test_what_a_link_leads_to_outside_never_travels(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, under_git: bool
) -> None:
    outside = tmp_path_factory.mktemp("outside")
    make(outside, "secret.txt", "folder/other.txt", "sibling/train.py")
    make(tmp_path, "train.py", "lib/net.py")
    links = {
        "notes.txt": outside / "secret.txt",
        "all": outside,
        "lib/up": Path("../.."),
        "through": Path("all/folder"),
    }
    for link, target in links.items():
        (tmp_path / link).symlink_to(target)
    if under_git:
        git(tmp_path, "init")
        git(tmp_path, "add", ".")
    assert packed(tmp_path) == {"train.py": "train.py", "lib/net.py": "lib/net.py"}
    assert collect_files(tmp_path).left_out == [
        f"all (leads out of the project, to {outside})",
        "lib/up (leads out of the project, to ../..)",
        f"notes.txt (leads out of the project, to {outside}/secret.txt)",
        "through (leads out of the project, to all/folder)",
    ]


def test_a_link_to_what_is_left_out_is_left_out(tmp_path: Path) -> None:
    make(tmp_path, "train.py", "data/big.bin", "data/more/big.bin")
    (tmp_path / "one.bin").symlink_to("data/big.bin")
    (tmp_path / "more").symlink_to("data/more")
    assert packed(tmp_path) == {"train.py": "train.py"}
    assert collect_files(tmp_path).left_out == [
        "data (left out by its name)",
        "more (leads to data/more, which is not sent)",
        "one.bin (leads to data/big.bin, which is not sent)",
    ]


def test_links_that_lead_in_circles_or_nowhere_are_said(tmp_path: Path) -> None:
    make(tmp_path, "train.py", "a/x.py", "b/y.py")
    for link, target in {"self": "self", "here": ".", "a/up": "..", "a/b": "../b", "b/a": "../a", "gone": "no"}.items():
        (tmp_path / link).symlink_to(target)
    project = collect_files(tmp_path)
    assert {"a/x.py", "b/y.py", "a/b/y.py", "b/a/x.py", "train.py"} <= {str(name) for name in project.files}
    assert len(project.files) < 20
    assert {
        "self (leads in a circle)",
        "here (leads in a circle)",
        "a/up (leads in a circle)",
        "gone (leads nowhere)",
    } <= (set(project.left_out))


def test_links_that_multiply_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projects, "MOST_FILES", 1000)
    for level in range(10):
        make(tmp_path, f"{level}/x.py")
        for number in range(4):
            (tmp_path / str(level) / f"link{number}").symlink_to(f"../{level + 1}")
    make(tmp_path, "10/x.py")
    with pytest.raises(PackageError, match=r"too large to send: more than 1,000 files, those behind links included"):
        collect_files(tmp_path)


def test_links_that_multiply_without_a_file_behind_them_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projects, "MOST_FILES", 1000)
    for level in range(14):
        folder = tmp_path / f"level{level}"
        folder.mkdir()
        for name in "ab":
            (folder / name).symlink_to(f"../level{level - 1}" if level else "nowhere")
    with pytest.raises(PackageError, match="more than 1,000 files"):
        collect_files(tmp_path)
