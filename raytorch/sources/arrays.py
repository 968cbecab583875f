"""Arrays in files, memory-mapped."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from raytorch.config.sources import ArraysData
from raytorch.errors import DataError
from raytorch.sources.files import Root

Array = np.ndarray[Any, Any]


class Arrays:
    """A batch is a tuple of the fields, tensors (B, ...) of the dtypes in the files."""

    def __init__(self, section: ArraysData, split: str, training: bool) -> None:
        """Raises DataError for files that are not in order."""
        self._root, self._fields = Root.of(section), section.fields
        files = self._root.find(section.files_of(split), [".npy"])
        named = {file.name.rpartition("/")[2].removesuffix(".npy"): file.name for file in files}
        for field in self._fields:
            if field not in named:
                raise DataError(
                    f"{self._root}: expected {field}.npy, for data.fields, found {', '.join(sorted(named)) or 'none'}"
                )
        self._names = [named[field] for field in self._fields]
        self._arrays: list[Array] | None = None
        lengths = [len(array) for array in self._open()]
        if len(set(lengths)) > 1:
            raise DataError(f"{self._root}: {self._names[0]} has {lengths[0]:,} entries and the others {lengths[1:]}")

    def __len__(self) -> int:
        return len(self._open()[0])

    @property
    def facts(self) -> dict[str, Any]:
        """The shape of a sample's first field."""
        return {"input_shape": list(self._open()[0].shape[1:])}

    def batch(self, indices: Tensor) -> tuple[Tensor, ...]:
        """The samples, int64 (B,), one after the other."""
        return tuple(torch.from_numpy(np.ascontiguousarray(array[indices.numpy()])) for array in self._open())

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_arrays": None}

    def _open(self) -> list[Array]:
        if self._arrays is None:
            self._arrays = [self._mapped(name) for name in self._names]
        return self._arrays

    def _mapped(self, name: str) -> Array:
        try:
            return np.load(self._root.local(name), mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]
        except (ValueError, OSError, EOFError) as error:
            raise DataError(f"{self._root.place(name)}: expected an .npy file: {error}") from error
