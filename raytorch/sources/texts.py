"""Many short texts, such as names of files, in two arrays: a list of them would take three times the memory."""

from collections.abc import Iterable

import numpy as np


class Texts:
    """Texts by their numbers, names of files that are not UTF-8 among them.

    Example:
        >>> Texts(["cat.jpg", "dog.jpg"])[1]
        'dog.jpg'
    """

    def __init__(self, texts: Iterable[str]) -> None:
        parts = [text.encode(errors="surrogateescape") for text in texts]
        self._bytes = np.frombuffer(b"".join(parts), np.uint8)
        self._ends = np.cumsum([0, *(len(part) for part in parts)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: int) -> str:
        return self._bytes[self._ends[number] : self._ends[number + 1]].tobytes().decode(errors="surrogateescape")
