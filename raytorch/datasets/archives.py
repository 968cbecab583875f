"""Unpack gzip files and tar archives, trusting nothing that they say about names and sizes."""

import gzip
import tarfile
import zlib
from pathlib import Path, PurePosixPath

from raytorch.datasets.file_errors import fault, reading

_CHUNK = 2**20


def inflate(archive: Path, target: Path, most: int) -> None:
    """Write what a gzip file holds to ``target``: at most ``most`` bytes. Raises DataError."""
    written = 0
    with (
        reading(archive, "a gzip file", gzip.BadGzipFile, EOFError, zlib.error),
        gzip.open(archive) as packed,
        target.open("wb") as plain,
    ):
        while chunk := packed.read(_CHUNK):
            written += plain.write(chunk)
            if written > most:
                raise fault(archive, f"at most {most:,} bytes when it is inflated", "more")


def unpack(archive: Path, folder: str, into: Path) -> list[Path]:
    """Write the files that a plain tar archive has in ``folder`` to ``into``; answers where. Raises DataError.

    Writes nothing if the archive holds anything but plain files in that one folder.
    """
    # MemoryError, as tarfile asks for as much as a header claims, before it finds that the file holds less.
    failures = (tarfile.TarError, ValueError, OverflowError, RecursionError, MemoryError)
    with reading(archive, "a tar archive", *failures), tarfile.open(archive, "r:") as tar:
        members = [member for member in tar if not _is_folder(member, folder)]
        for member in members:
            _require_file_in(member, folder, archive)
        return [_write(tar, member, into) for member in members]


def _is_folder(member: tarfile.TarInfo, folder: str) -> bool:
    return member.isdir() and PurePosixPath(member.name) == PurePosixPath(folder)


def _require_file_in(member: tarfile.TarInfo, folder: str, archive: Path) -> None:
    name = PurePosixPath(member.name).name
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
        raise fault(archive, "plain files only", f"{member.name!a} of another kind, such as a link")
    if member.name != f"{folder}/{name}" or name in ("", ".."):
        raise fault(archive, f"files in {folder}/ only", ascii(member.name))


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, into: Path) -> Path:
    path = into / PurePosixPath(member.name).name
    content = tar.extractfile(member)
    assert content
    path.write_bytes(content.read())  # of the size that the archive has at most
    return path
