"""The archive that files travel in with a job. Imports neither torch nor ray."""

import os
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from raytorch.errors import PackageError
from raytorch.service.projects import IGNORE_FILE, shown
from raytorch.system.regular_files import open_regular

LIMIT = 100 * 1024**2
"""Bytes of the largest archive that a Ray 2.60 dashboard accepts: its DASHBOARD_CLIENT_MAX_SIZE."""
EPOCH = (1980, 1, 1, 0, 0, 0)
"""Time of every file in an archive, so that unchanged files have the same digest."""


def pack(root: Path, files: Mapping[Path, Path], archive: Path, limit: int = LIMIT) -> list[Path]:
    """Write ``files``, by their paths in it, into a zip archive with their permissions; answers which were gone.

    Raises PackageError if the archive would have more than ``limit`` bytes, or a file cannot be read.
    """
    gone = []
    with zipfile.ZipFile(archive, "w") as package:
        for name, path in files.items():
            try:
                source = os.fdopen(open_regular(path, os.O_RDONLY | os.O_NOFOLLOW), "rb")  # no link that is there now
            except FileNotFoundError:
                gone.append(name)
                continue
            except OSError as error:
                raise PackageError(
                    f"{shown(path)} cannot be read: {error.strerror}; make it readable, or list it in {IGNORE_FILE}"
                ) from None
            with source, package.open(_entry(name, source), "w", force_zip64=True) as target:
                while block := source.read(1 << 20):
                    target.write(block)
                    if archive.stat().st_size > limit:  # said before gigabytes are read to their end
                        raise PackageError(_too_large(root, files, limit))
    if archive.stat().st_size > limit:
        raise PackageError(_too_large(root, files, limit))
    return gone


def mark(archive: Path, job_id: str) -> None:
    """Make an archive the job's own, whatever others have the same content.

    Ray unpacks equal archives once, so such jobs would write into one folder. And a node that meets an archive for the
    first time unpacks it anew (Ray 2.60): where several nodes share a machine, under the processes that work there.
    """
    with zipfile.ZipFile(archive, "a") as package:
        package.comment = job_id.encode()


def _entry(name: Path, source: BinaryIO) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(str(name), EPOCH)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = os.fstat(source.fileno()).st_mode << 16
    return entry


def _too_large(root: Path, files: Mapping[Path, Path], limit: int) -> str:
    sizes = {name: path.stat().st_size for name, path in files.items() if path.exists()}
    folders: Counter[str] = Counter()
    for name, size in sizes.items():
        folders[shown(name) if len(name.parts) == 1 else f"{shown(name.parts[0])}/"] += size
    listed = ", ".join(f"{name} ({_mebibytes(size)})" for name, size in folders.most_common(3))
    return (
        f"{root} is too large to send: {_mebibytes(sum(sizes.values()))} in {len(files):,} files, and packed more than "
        f"the {_mebibytes(limit)} that the cluster accepts; the largest: {listed}. List what the job does not need in "
        ".gitignore or .rayignore; data belongs where every node reaches it"
    )


def _mebibytes(size: int) -> str:
    return f"{size / 1024**2:,.1f} MiB"
