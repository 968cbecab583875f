"""A file below a root as an object that reads parts of it, for libraries that take one."""

import io

from raytorch.sources.files import File, Root


class RangeFile(io.RawIOBase):
    """Reads the parts that are asked for, each by a request of its own.

    Example:
        >>> RangeFile(Root("data"), File("train.parquet", 1234)).read(4)
        b'PAR1'
    """

    def __init__(self, root: Root, file: File) -> None:
        self._root, self._file, self._position = root, file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        self._position = start + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = max(self._file.size - self._position, 0)
        size = left if size is None or size < 0 else min(size, left)
        content = self._root.read(self._file.name, self._position, size, whole=True) if size else b""
        self._position += len(content)
        return content
