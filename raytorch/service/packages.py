"""Which files of a project travel with a job, and the archive that they travel in. Imports neither torch nor ray."""

import os
import subprocess
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from raytorch.errors import PackageError

LIMIT = 100 * 1024**2
"""Bytes of the largest archive that a Ray 2.60 dashboard accepts: its DASHBOARD_CLIENT_MAX_SIZE."""
LEFT_OUT = {"__pycache__", "node_modules", "runs", "data"}
"""Folders that are no part of a project that is not under git."""
EPOCH = (1980, 1, 1, 0, 0, 0)
"""Time of every file in an archive, so that unchanged files have the same digest."""


def project_files(root: Path) -> list[Path]:
    """The files of a project, as paths relative to its folder, sorted.

    Under git these are the tracked files and the new ones that it does not ignore; elsewhere all but those in hidden
    folders, virtual environments, caches, ``runs`` and ``data``. What a ``.rayignore`` lists stays out either way.
    """
    listed = _listed_by_git(root)
    found = _walk(root) if listed is None else (Path(name) for name in listed if (root / name).is_file())
    return _without_ignored(root, sorted(found))


def pack(root: Path, files: Iterable[Path], archive: Path, limit: int = LIMIT) -> None:
    """Write files of ``root`` into a zip archive with their permissions.

    Raises:
        PackageError: The archive would be larger than ``limit`` bytes.
    """
    files = list(files)
    with zipfile.ZipFile(archive, "w") as package:
        for file in files:
            with (root / file).open("rb") as source, package.open(_entry(root, file), "w", force_zip64=True) as target:
                while block := source.read(1 << 20):
                    target.write(block)
                    if archive.stat().st_size > limit:  # said before gigabytes are read to their end
                        raise PackageError(_too_large(root, files, limit))
    if archive.stat().st_size > limit:
        raise PackageError(_too_large(root, files, limit))


def mark(archive: Path, job_id: str) -> None:
    """Make an archive the job's own, whatever others have the same content.

    Ray unpacks equal archives once, so such jobs would write into one folder. And a node that meets an archive for the
    first time unpacks it anew (Ray 2.60): where several nodes share a machine, under the processes that work there.
    """
    with zipfile.ZipFile(archive, "a") as package:
        package.comment = job_id.encode()


def _entry(root: Path, file: Path) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(str(file), EPOCH)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = (root / file).stat().st_mode << 16
    return entry


def _too_large(root: Path, files: list[Path], limit: int) -> str:
    sizes = {file: (root / file).stat().st_size for file in files}
    folders: dict[str, int] = {}
    for file, size in sizes.items():
        label = str(file) if len(file.parts) == 1 else f"{file.parts[0]}/"
        folders[label] = folders.get(label, 0) + size
    largest = sorted(folders.items(), key=lambda item: -item[1])[:3]
    listed = ", ".join(f"{name} ({_mebibytes(size)})" for name, size in largest)
    return (
        f"{root} is too large to send: {_mebibytes(sum(sizes.values()))} in {len(files):,} files, and packed more than "
        f"the {_mebibytes(limit)} that the cluster accepts; the largest: {listed}. List what the job does not need in "
        ".gitignore or .rayignore; data belongs where every node reaches it"
    )


def _mebibytes(size: int) -> str:
    return f"{size / 1024**2:,.1f} MiB"


def _listed_by_git(root: Path) -> list[str] | None:
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, check=True).stdout  # noqa: S603
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        return None
    return [os.fsdecode(name) for name in set(listed.split(b"\0")) if name]


def _walk(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        folders[:] = [name for name in folders if _belongs(here / name)]
        yield from ((here / name).relative_to(root) for name in files if (here / name).is_file())


def _belongs(folder: Path) -> bool:
    return not (
        folder.name.startswith(".")
        or folder.name in LEFT_OUT
        or (folder / "pyvenv.cfg").exists()
        or folder.is_symlink()
    )


def _without_ignored(root: Path, files: list[Path]) -> list[Path]:
    """Leave out what the ``.rayignore`` in a folder says of the files below it, as Ray does itself with folders."""
    for rules in [file for file in files if file.name == ".rayignore"]:
        # The matcher that Ray itself reads these files with (2.60).
        from ray._private.thirdparty.pathspec import PathSpec

        ignored = PathSpec.from_lines("gitwildmatch", (root / rules).read_text().splitlines())
        below = rules.parent
        files = [
            file
            for file in files
            if not (file.is_relative_to(below) and ignored.match_file(str(file.relative_to(below))))
        ]
    return files
