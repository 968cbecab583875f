"""Which files of a project travel with a job."""

import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from raytorch.errors import PackageError
from raytorch.service import packages
from raytorch.service.packages import mark, pack, project_files


def make(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def names(root: Path) -> list[str]:
    return [str(file) for file in project_files(root)]


def git(root: Path, *arguments: str) -> None:
    identity = {
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@b",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@b",
    }
    subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True, env=os.environ | identity)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init")
    make(tmp_path, "train.py", "lib/net.py", "kept.log", "gone.py")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "all")
    (tmp_path / ".gitignore").write_text("*.log\nout/\n")
    make(tmp_path, "new.py", "noise.log", "out/model.bin", "data/small.csv")
    (tmp_path / "gone.py").unlink()
    return tmp_path


def test_under_git_it_is_what_git_tracks_and_what_it_would_take(repository: Path) -> None:
    assert names(repository) == [".gitignore", "data/small.csv", "kept.log", "lib/net.py", "new.py", "train.py"]
    assert names(repository / "lib") == ["net.py"]


def test_elsewhere_it_is_what_a_person_wrote(tmp_path: Path) -> None:
    make(tmp_path, "train.py", "lib/net.py", "lib/__pycache__/net.pyc", ".cache/a", "runs/r/x", "data/d", ".env")
    make(tmp_path, "env/pyvenv.cfg", "env/lib/python.py", "lib/data.py")
    assert names(tmp_path) == [".env", "lib/data.py", "lib/net.py", "train.py"]


def test_rayignore_counts_in_both(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("plain")
    make(elsewhere, "train.py", "a/big.bin", "a/b/big.bin", "big.bin")
    (elsewhere / "a" / ".rayignore").write_text("*.bin\n")
    assert names(elsewhere) == ["a/.rayignore", "big.bin", "train.py"]
    (repository / ".rayignore").write_text("data/\nkept.log\n")
    assert names(repository) == [".gitignore", ".rayignore", "lib/net.py", "new.py", "train.py"]


def test_an_archive_holds_contents_and_permissions_and_is_the_same_again(tmp_path: Path) -> None:
    project = tmp_path / "project"
    make(project, "train.py", "tools/run.sh")
    (project / "tools" / "run.sh").chmod(0o755)
    for name in ("one.zip", "two.zip"):
        pack(project, project_files(project), tmp_path / name)
        (project / "train.py").touch()
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        assert {entry.filename: entry.external_attr >> 16 & 0o777 for entry in archive.infolist()} == {
            "train.py": (project / "train.py").stat().st_mode & 0o777,
            "tools/run.sh": 0o755,
        }
        assert archive.read("tools/run.sh") == b"tools/run.sh"


def test_an_archive_is_its_jobs_own(tmp_path: Path) -> None:
    make(tmp_path, "train.py")
    contents = []
    for job in ("one", "two"):
        archive = tmp_path / f"{job}.zip"
        pack(tmp_path, [Path("train.py")], archive)
        mark(archive, job)
        contents.append(archive.read_bytes())
        with zipfile.ZipFile(archive) as package:
            assert package.read("train.py") == b"train.py"
    assert contents[0] != contents[1]


def test_what_is_too_large_is_refused_with_what_makes_it_so(tmp_path: Path) -> None:
    make(tmp_path, "train.py", "lib/net.py")
    (tmp_path / "weights.bin").write_bytes(os.urandom(3 << 20))
    (tmp_path / "images").mkdir()
    for number in range(2):
        (tmp_path / "images" / f"{number}.png").write_bytes(os.urandom(2 << 20))
    with pytest.raises(PackageError) as refusal:
        pack(tmp_path, project_files(tmp_path), Path(f"{tmp_path}.zip"), limit=1 << 20)
    assert str(refusal.value) == (
        f"{tmp_path} is too large to send: 7.0 MiB in 5 files, and packed more than the 1.0 MiB that the cluster "
        "accepts; the largest: images/ (4.0 MiB), weights.bin (3.0 MiB), lib/ (0.0 MiB). List what the job does not "
        "need in .gitignore or .rayignore; data belongs where every node reaches it"
    )
    assert Path(f"{tmp_path}.zip").stat().st_size < 3 << 20  # said before all of it was read


def test_what_packs_well_may_be_large(tmp_path: Path) -> None:
    (tmp_path / "zeros.csv").write_bytes(bytes(4 << 20))
    pack(tmp_path, project_files(tmp_path), Path(f"{tmp_path}.zip"), limit=1 << 20)


def test_the_limit_is_the_dashboards() -> None:
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE

    assert packages.LIMIT == DASHBOARD_CLIENT_MAX_SIZE
