"""Arrays in files, memory-mapped."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from raytorch.config.sources import ArraysData
from raytorch.errors import DataError
from raytorch.sources.array_files import SUFFIXES, MappedArray, mapped_arrays
from raytorch.sources.by_block import by_block
from raytorch.sources.files import File, Root


class Part(NamedTuple):
    """Samples that lie together."""

    place: str
    """The file, or the folder of a file for each field."""
    arrays: list[MappedArray]
    """The fields."""


class Arrays:
    """A batch is a tuple of the fields, tensors (B, ...) of the dtypes in the files."""

    def __init__(self, section: ArraysData, split: str, training: bool) -> None:
        """Raises DataError for files that are not in order."""
        self._root, self._fields = Root.of(section), section.fields
        self._files = self._root.find(section.files_of(split), SUFFIXES)
        trained_on = self._root.find(section.files_of("train"), SUFFIXES)
        of_training = self._parts_of(trained_on)
        self._classes = _classes(of_training)
        self._parts: list[Part] | None = of_training if self._files == trained_on else self._parts_of(self._files)
        self._require_same_form(of_training[0], [*of_training, *self._parts])
        self._ends = np.cumsum([len(part.arrays[0].content) for part in self._parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def facts(self) -> dict[str, Any]:
        """The shape of a sample's first field; and the number of classes, where the last says which a sample has, or
        of the numbers that are its targets, where it has some.
        """
        arrays = self._opened()[0].arrays
        first, last = arrays[0], arrays[-1]
        facts: dict[str, Any] = {"input_shape": list(first.content.shape[1:])}
        if self._classes is not None:
            facts["num_classes"] = self._classes
        elif len(self._fields) > 1 and last.content.ndim <= 2 and last.tensor(last.content[:0]).is_floating_point():
            facts["num_targets"] = math.prod(last.content.shape[1:])
        return facts

    @property
    def labels(self) -> Tensor | None:
        """The last field, where it is a whole number of each sample."""
        if not _is_whole_number(self._opened()[0].arrays[-1]):
            return None
        return torch.from_numpy(np.concatenate([part.arrays[-1].content for part in self._opened()], dtype=np.int64))

    @property
    def blocks(self) -> Tensor:
        """Samples of each file, or folder of files of a field each."""
        sizes = torch.from_numpy(np.diff(self._ends, prepend=0))
        return sizes[sizes > 0]

    def batch(self, indices: Tensor) -> tuple[Tensor, ...]:
        """The samples, int64 (B,), one after the other."""
        parts, samples = self._opened(), indices.numpy()
        if len(parts) == 1:
            return tuple(array.tensor(array.content[samples]) for array in parts[0].arrays)
        found = [np.empty((len(samples), *each.content.shape[1:]), each.content.dtype) for each in parts[0].arrays]
        for block, places, within in by_block(self._ends, samples):
            for array, values in zip(parts[block].arrays, found, strict=True):
                values[places] = array.content[within]
        return tuple(array.tensor(values) for array, values in zip(parts[0].arrays, found, strict=True))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_parts": None}

    def _opened(self) -> list[Part]:
        if self._parts is None:
            self._parts = self._parts_of(self._files)
        return self._parts

    def _parts_of(self, files: list[File]) -> list[Part]:
        """Of each file that has all fields, and of each folder of files that have one."""
        found: dict[str, dict[str, MappedArray | None]] = {}
        for file in files:
            place = self._root.place(file.name)
            whole = place.rpartition("/")[0] if file.name.lower().endswith(".npy") else place
            found.setdefault(whole, {}).update(mapped_arrays(self._root.local(file.name), place, self._fields))
        return [self._part(place, arrays) for place, arrays in found.items()]

    def _part(self, place: str, arrays: dict[str, MappedArray | None]) -> Part:
        ends = "" if place.lower().endswith(SUFFIXES) else ".npy"
        for field in self._fields:
            if field not in arrays:
                raise DataError(
                    f"{place}: expected {field}{ends}, for data.fields, found {', '.join(sorted(arrays)) or 'none'}"
                )
        part = Part(place, [array for field in self._fields if (array := arrays[field])])
        lengths = [len(array.content) for array in part.arrays]
        if len(set(lengths)) > 1:
            told = ", ".join(f"{field} has {length:,}" for field, length in zip(self._fields, lengths, strict=True))
            raise DataError(f"{place}: expected as many entries in each array, found that {told}")
        return part

    def _require_same_form(self, first: Part, parts: list[Part]) -> None:
        for part in parts:
            for field, array, expected in zip(self._fields, part.arrays, first.arrays, strict=True):
                if array.form != expected.form:
                    raise DataError(
                        f"{part.place}: expected entries of {expected.form} in {field}, as in {first.place}, found "
                        f"{array.form}"
                    )


def _is_whole_number(array: MappedArray) -> bool:
    return array.content.ndim == 1 and array.content.dtype.kind in "iu" and array.kind is None


def _classes(parts: Iterable[Part]) -> int | None:
    """How many classes there are, if the last field is their numbers, from 0."""
    most = 0
    for part in parts:
        numbers = part.arrays[-1].content
        if not _is_whole_number(part.arrays[-1]):
            return None
        if len(numbers) and int(numbers.min()) < 0:
            return None
        most = max(most, int(numbers.max()) + 1 if len(numbers) else 0)
    return most
