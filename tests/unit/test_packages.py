"""Which files of a project travel with a job, and what is said of those that do not."""

import os
import shutil
import socket
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path

import pytest
from project_files import git, make, names, packed

from raytorch.errors import PackageError
from raytorch.service import packages
from raytorch.service.packages import mark, pack
from raytorch.service.projects import collect_files


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init")
    make(tmp_path, "train.py", "lib/net.py", "kept.log", "gone.py")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "all")
    (tmp_path / ".gitignore").write_text("*.log\nout/\n", encoding="utf-8")
    make(tmp_path, "new.py", "noise.log", "out/model.bin", "data/small.csv")
    (tmp_path / "gone.py").unlink()
    return tmp_path


def test_under_git_it_is_what_git_tracks_and_what_it_would_take(repository: Path) -> None:
    assert names(repository) == [".gitignore", "data/small.csv", "kept.log", "lib/net.py", "new.py", "train.py"]
    assert names(repository / "lib") == ["net.py"]
    assert collect_files(repository).told() == ""


def test_elsewhere_it_is_what_a_person_wrote(tmp_path: Path) -> None:
    make(tmp_path, "train.py", "lib/net.py", "lib/__pycache__/net.pyc", ".cache/a", "runs/r/x", "data/d", ".env")
    make(tmp_path, "env/pyvenv.cfg", "env/lib/python.py", "lib/data.py")
    assert names(tmp_path) == [".env", "lib/data.py", "lib/net.py", "train.py"]


def test_a_package_may_be_named_like_a_folder_of_results(tmp_path: Path) -> None:
    make(tmp_path, "train.py", "lib/data/a.py", "lib/runs/b.py", "data/d.csv", "runs/r/x", "lib/node_modules/m.js")
    assert names(tmp_path) == ["lib/data/a.py", "lib/runs/b.py", "train.py"]
    assert collect_files(tmp_path).told() == (
        f"not sent from {tmp_path}: data (left out by its name), runs (left out by its name), "
        "lib/node_modules (left out by its name)"
    )


def test_what_is_left_out_is_counted_and_the_first_named(tmp_path: Path) -> None:
    make(tmp_path, "train.py", ".git/config", "__pycache__/x.pyc", *(f".hidden{n}/a" for n in range(7)))
    (tmp_path / ".git" / "config").unlink()
    (tmp_path / ".git").rmdir()
    assert collect_files(tmp_path).told() == (
        f"not sent from {tmp_path}: .hidden0 (hidden), .hidden1 (hidden), .hidden2 (hidden), .hidden3 (hidden), "
        ".hidden4 (hidden), and 2 more"
    )


def test_rayignore_counts_in_both(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("plain")
    make(elsewhere, "train.py", "a/big.bin", "a/b/big.bin", "big.bin")
    (elsewhere / "a" / ".rayignore").write_text("*.bin\n", encoding="utf-8")
    assert names(elsewhere) == ["a/.rayignore", "big.bin", "train.py"]
    (repository / ".rayignore").write_text("data/\nkept.log\n", encoding="utf-8")
    assert names(repository) == [".gitignore", ".rayignore", "lib/net.py", "new.py", "train.py"]
    (repository / ".gitignore").write_text("*.log\nout/\n.rayignore\n", encoding="utf-8")
    assert names(repository) == [".gitignore", "lib/net.py", "new.py", "train.py"]


def test_a_rayignore_is_read_in_the_encoding_of_the_names(tmp_path: Path) -> None:
    make(tmp_path, "train.py", "kept.bin")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.bin")).write_text("big", encoding="utf-8")
    (tmp_path / ".rayignore").write_bytes(b"# Stra\xdfe\r\ncaf\xe9.bin\r\n")
    assert names(tmp_path) == [".rayignore", "kept.bin", "train.py"]
    Path(os.fsdecode(os.fsencode(tmp_path) + "/café.bin".encode())).write_text("big", encoding="utf-8")
    (tmp_path / ".rayignore").write_bytes("\ufeffcaf*.bin\n".encode())
    assert names(tmp_path) == [".rayignore", "kept.bin", "train.py"]


def test_a_rayignore_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "train.py")
    (tmp_path / ".rayignore").write_text("!\n", encoding="utf-8")
    with pytest.raises(PackageError, match=r"/\.rayignore cannot be read: "):
        collect_files(tmp_path)


def test_names_that_no_archive_can_hold_are_refused(tmp_path: Path) -> None:
    make(tmp_path, "train.py")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_text("x", encoding="utf-8")
    with pytest.raises(PackageError) as refusal:
        collect_files(tmp_path)
    assert str(refusal.value) == (
        "file names that are no UTF-8 cannot be sent: caf\\xe9.txt; rename them, or list them in .rayignore"
    )


# -- repositories in the project ---------------------------------------------------------------------------------------


@pytest.fixture
def nested(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository with a submodule and a clone in it, each with a file that is new and one that is ignored."""
    other = tmp_path_factory.mktemp("other")
    git(other, "init")
    make(other, "part.py")
    (other / ".gitignore").write_text("*.log\n", encoding="utf-8")
    git(other, "add", ".")
    git(other, "commit", "-m", "all")
    git(repository, "-c", "protocol.file.allow=always", "submodule", "add", str(other), "vendor/part")
    git(repository, "clone", str(other), "clone")
    for place in ("vendor/part", "clone"):
        make(repository, f"{place}/new.py", f"{place}/noise.log")
    return repository


def test_submodules_and_clones_are_sent_with_what_is_new_in_them(nested: Path) -> None:
    own = [".gitignore", ".gitmodules", "data/small.csv", "kept.log", "lib/net.py", "new.py", "train.py"]
    theirs = [f"{place}/{name}" for place in ("clone", "vendor/part") for name in (".gitignore", "new.py", "part.py")]
    assert names(nested) == sorted(own + theirs)
    assert names(nested / "vendor") == ["part/.gitignore", "part/new.py", "part/part.py"]
    assert collect_files(nested).left_out == []


def test_a_submodule_that_is_not_checked_out_is_said(nested: Path) -> None:
    git(nested, "submodule", "deinit", "--force", "vendor/part")
    assert collect_files(nested).left_out == ["vendor/part (a submodule that is not checked out)"]


def test_a_project_that_an_outer_repository_ignores_is_sent(repository: Path) -> None:
    make(repository, "out/mine/train.py", "out/mine/lib/net.py")
    assert names(repository / "out" / "mine") == ["lib/net.py", "train.py"]


def test_a_repository_that_git_does_not_read_is_refused(repository: Path) -> None:
    (repository / ".git" / "config").write_text("[core\n", encoding="utf-8")
    with pytest.raises(PackageError, match=r"^git cannot list the files of .*, so that none are sent: .*bad config"):
        collect_files(repository)


def test_the_repository_of_a_hook_is_not_that_of_the_project(
    repository: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    make(elsewhere, "train.py")
    monkeypatch.setenv("GIT_DIR", str(repository / ".git"))
    assert names(elsewhere) == ["train.py"]


def test_a_repository_in_the_project_runs_nothing(nested: Path, tmp_path: Path) -> None:
    (nested / "more").mkdir()
    make(nested / "more", "a.py")
    git(nested / "more", "init", "-q")
    program = tmp_path / "program"
    for place in (nested, nested / "more"):
        git(place, "config", "core.fsmonitor", f"touch '{program}'; false")
    assert "more/a.py" in names(nested)
    assert not program.exists()


def test_the_script_is_sent_wherever_it_leads(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside")
    make(outside, "shared.py")
    (tmp_path / "train.py").symlink_to(outside / "shared.py")
    assert collect_files(tmp_path, Path("train.py")).files == {Path("train.py"): outside / "shared.py"}


# -- what is no file, and what changes ---------------------------------------------------------------------------------


def test_pipes_and_sockets_are_said_and_not_waited_for(tmp_path: Path) -> None:
    make(tmp_path, "train.py")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to_pipe").symlink_to("pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        with chdir(tmp_path):  # the paths of sockets have to be short
            listener.bind("socket")
        assert packed(tmp_path) == {"train.py": "train.py"}
    assert collect_files(tmp_path).left_out == [
        "pipe (no regular file)",
        "socket (no regular file)",
        "to_pipe (leads to pipe, which is not sent)",
    ]


def test_what_vanishes_or_changes_meanwhile_is_not_sent(tmp_path: Path) -> None:
    project = tmp_path / "project"
    make(project, "train.py", "gone.py", "turned.py")
    files = collect_files(project).files
    (project / "gone.py").unlink()
    assert pack(project, files, tmp_path / "one.zip") == [Path("gone.py")]
    (project / "turned.py").unlink()
    (project / "turned.py").symlink_to("/etc/passwd")
    with pytest.raises(PackageError, match=r"turned\.py cannot be read: "):
        pack(project, files, tmp_path / "two.zip")
    (project / "turned.py").unlink()
    os.mkfifo(project / "turned.py")
    with pytest.raises(PackageError, match=r"turned\.py cannot be read: it is not a file"):
        pack(project, files, tmp_path / "three.zip")


@contextmanager
def unprivileged(folder: Path) -> Iterator[None]:
    """Be a user that no file is readable for by privilege alone."""
    if os.geteuid() != 0:
        yield
        return
    os.chown(folder, 65534, 65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_what_cannot_be_read_is_refused_by_its_name() -> None:
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # one that every user can reach
    try:
        make(folder, "project/train.py", "project/secret.key", "project/closed/a.py")
        for name in ("project", "project/train.py"):
            (folder / name).chmod(0o755)
        (folder / "project" / "secret.key").chmod(0)
        (folder / "project" / "closed").chmod(0)
        with unprivileged(folder):
            with pytest.raises(
                PackageError, match=r"project/closed cannot be read: Permission denied; make it readable"
            ):
                collect_files(folder / "project")
            files = {Path("secret.key"): folder / "project" / "secret.key"}
            with pytest.raises(PackageError, match=r"/secret\.key cannot be read: Permission denied; make it readable"):
                pack(folder, files, folder / "project.zip")
        (folder / "project" / "closed").chmod(0o755)
    finally:
        shutil.rmtree(folder)


# -- the archive -------------------------------------------------------------------------------------------------------


def test_an_archive_holds_contents_and_permissions_and_is_the_same_again(tmp_path: Path) -> None:
    project = tmp_path / "project"
    make(project, "train.py", "tools/run.sh")
    (project / "tools" / "run.sh").chmod(0o755)
    for name in ("one.zip", "two.zip"):
        pack(project, collect_files(project).files, tmp_path / name)
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
        pack(tmp_path, {Path("train.py"): tmp_path / "train.py"}, archive)
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
        pack(tmp_path, collect_files(tmp_path).files, Path(f"{tmp_path}.zip"), limit=1 << 20)
    assert str(refusal.value) == (
        f"{tmp_path} is too large to send: 7.0 MiB in 5 files, and packed more than the 1.0 MiB that the cluster "
        "accepts; the largest: images/ (4.0 MiB), weights.bin (3.0 MiB), lib/ (0.0 MiB). List what the job does not "
        "need in .gitignore or .rayignore; data belongs where every node reaches it"
    )
    assert Path(f"{tmp_path}.zip").stat().st_size < 3 << 20  # said before all of it was read


def test_what_packs_well_may_be_large(tmp_path: Path) -> None:
    (tmp_path / "zeros.csv").write_bytes(bytes(4 << 20))
    pack(tmp_path, collect_files(tmp_path).files, Path(f"{tmp_path}.zip"), limit=1 << 20)


def test_the_limit_is_the_dashboards() -> None:
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE

    assert packages.LIMIT == DASHBOARD_CLIENT_MAX_SIZE
