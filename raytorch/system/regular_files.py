"""Opening regular files, and nothing else: a pipe would be waited for. Imports neither torch nor ray."""

import errno
import os
import stat

LONGEST_READ = 2**26
"""Bytes that are read at once."""


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


class RegularFile:
    """An open file that is read from anywhere, by several threads at once if need be.

    Args:
        descriptor: Of :func:`open_regular`; :meth:`close` closes it.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.size = os.fstat(descriptor).st_size

    def read_into(self, place: int, memory: memoryview) -> None:
        """Fill ``memory`` with what begins at byte ``place``. Raises EOFError where the file has less."""
        while memory:
            count = os.preadv(self._descriptor, [memory[:LONGEST_READ]], place)
            if not count:
                raise EOFError(place)
            memory, place = memory[count:], place + count

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._descriptor)
