"""Deletion of whole folders, however deep they are; ``shutil.rmtree`` recurses. Imports neither torch nor ray."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from secrets import token_hex

_FOLDER = os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY


def delete_tree(path: str | os.PathLike[str], at: int | None = None) -> None:
    """Delete a folder with all that is in it; what a link leads to stays.

    Folders within folders are moved up and then deleted, so that neither their depth nor the length of their paths
    matters. ``at`` is the descriptor of the folder that a relative ``path`` is in.

    Raises:
        OSError: It is a link, or something in it cannot be deleted, the first such thing; the rest is.
    """
    stuck: dict[str, OSError] = {}
    with _opened(path, at) as top:
        while folders := [name for name in _emptied(top) if name not in stuck]:
            for name in folders:
                try:
                    with _opened(name, top) as inner:
                        for each in _emptied(inner):
                            os.rename(each, token_hex(16), src_dir_fd=inner, dst_dir_fd=top)
                    os.rmdir(name, dir_fd=top)
                except OSError as error:
                    stuck[name] = error
    for reason in stuck.values():
        raise reason
    os.rmdir(path, dir_fd=at)


@contextmanager
def _opened(path: str | os.PathLike[str], at: int | None) -> Iterator[int]:
    descriptor = os.open(path, _FOLDER, dir_fd=at)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _emptied(at: int) -> list[str]:
    """Delete what is in a folder, but for the folders that are not empty, whose names are returned."""
    with os.scandir(at) as entries:
        found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    left = []
    for name, is_folder in found:
        try:
            with suppress(FileNotFoundError):  # somebody else deletes as well
                (os.rmdir if is_folder else os.unlink)(name, dir_fd=at)
        except OSError as error:
            if not is_folder or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            left.append(name)
    return left
