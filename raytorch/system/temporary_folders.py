"""Temporary folders that bear their owner's name, so that those of processes which were killed go at the next start.

They are in one folder of the user's own below the system's. Imports neither torch nor ray.
"""

import os
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from secrets import token_hex

from raytorch.system.deletion import delete_tree
from raytorch.system.processes import Process, kill_writers

_NAME = re.compile(r"(\d+)-(\d+)-([0-9a-f-]*)-(\d*)-[0-9a-f]{8}")
_RAY_SESSION = re.compile(r"session_[0-9-]+_[0-9-]+_[0-9]+_[0-9]+")


def make_temporary() -> Path:
    """Make an empty folder that its owner deletes, or, if that is killed, the next process to come here."""
    delete_abandoned()
    path = _new_path()
    path.mkdir(mode=0o700)
    return path


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """An empty folder for as long as the block runs."""
    path = make_temporary()
    try:
        yield path
    finally:
        with suppress(OSError):
            delete_tree(path)


def note_ray_session(folder: str) -> None:
    """Have what is left of a Ray that this process has started ended and deleted by the next one to come after it.

    Ray itself leaves a folder for each start, with its logs, for good; where who started it is killed, its agents go on
    for minutes.
    """
    with suppress(OSError):
        _new_path().symlink_to(folder)


@cache
def delete_abandoned() -> None:
    """Delete what processes of this user left that are gone; once in each process."""
    with suppress(OSError):
        for path in users_folder().iterdir():
            if _is_abandoned(path.name):
                _delete(path)


def _delete(path: Path) -> None:
    if not path.is_symlink():
        with suppress(OSError):
            delete_tree(path)
        return
    session = path.readlink()
    if session.is_absolute() and _RAY_SESSION.fullmatch(session.name) and not session.is_symlink():
        kill_writers(session, "ray::")  # its agents: the rest of a Ray ends with who started it (seen with Ray 2.60)
        with suppress(OSError):
            delete_tree(session)
    path.unlink(missing_ok=True)


def _is_abandoned(name: str) -> bool:
    """Tell whether the owner of a folder of this name has ended, or the machine was started anew since."""
    match = _NAME.fullmatch(name)
    if not match:
        return False
    here = Process.current()
    boot, namespace = match[3] or None, f"pid:[{match[4]}]" if match[4] else None
    owner = Process(here.host, int(match[1]), int(match[2]) or None, boot, namespace)
    return boot != here.boot or owner.is_alive() is False


def _new_path() -> Path:
    here = Process.current()
    namespace = re.sub(r"\D", "", here.namespace or "")
    return users_folder() / f"{here.pid}-{here.began or 0}-{here.boot or ''}-{namespace}-{token_hex(4)}"


def users_folder() -> Path:
    """The folder of them, which is this user's alone. Raises PermissionError if somebody else has made it."""
    path = Path(tempfile.gettempdir(), f"raytorch-{os.getuid()}")
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(f"{path} is not a folder of this user's; move it away, or set TMPDIR to another folder")
    return path
