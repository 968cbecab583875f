"""Opening regular files, and nothing else: a pipe would be waited for. Imports neither torch nor ray."""

import errno
import os
import stat


def open_regular(path: str | os.PathLike[str], flags: int = os.O_RDONLY, at: int | None = None) -> int:
    """The descriptor of a regular file, in the folder ``at`` where ``path`` is relative.

    Raises:
        OSError: It cannot be opened, or is no such file: ENXIO, as the system has it for sockets.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK, 0o666, dir_fd=at)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.ENXIO, "it is not a file, but a folder, a pipe or a device")
    return descriptor
