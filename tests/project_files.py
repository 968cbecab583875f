"""What tests of projects share: files and repositories, and what an archive of them holds."""

import os
import subprocess
import tempfile
import zipfile
from pathlib import Path

from raytorch.service.packages import pack
from raytorch.service.projects import collect_files


def make(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name, encoding="utf-8")


def names(root: Path) -> list[str]:
    return sorted(str(file) for file in collect_files(root).files)


def git(root: Path, *arguments: str) -> None:
    identity = {
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@b",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@b",
    }
    subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True, env=os.environ | identity)


def packed(root: Path) -> dict[str, str]:
    """The contents of a project's archive."""
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "project.zip"
        pack(root, collect_files(root).files, archive)
        with zipfile.ZipFile(archive) as package:
            return {name: package.read(name).decode() for name in package.namelist()}
