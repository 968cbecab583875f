"""Tar shards in WebDataset's layout, read by position."""

import zlib
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

from raytorch.config.image_files import ShardsData
from raytorch.errors import DataError
from raytorch.sources.files import File, Root
from raytorch.sources.image_pipeline import ImagePipeline
from raytorch.sources.shard_fields import class_of, field_of
from raytorch.sources.shard_index import SUFFIX, Placed, extensions_in, read_index
from raytorch.sources.tar_headers import BLOCK
from raytorch.sources.texts import Texts

_CLASS = "cls"
_BETWEEN = 1 << 16
"""Bytes between files of a sample that are read along, as that is faster than to ask for each file."""
Files = dict[int, bytes]
"""Those of a sample that have been read, by the numbers of their fields."""


class Shards:
    """A batch is a tuple of the fields: images as of :class:`~raytorch.sources.images.Images`, classes int64 (B,),
    arrays as tensors (B, ...), and lists of texts and of what JSON has.
    """

    def __init__(self, section: ShardsData, split: str, training: bool) -> None:
        """Raises DataError for files that are not in order."""
        self._root, self._fields, self._skips = Root.of(section), section.fields, section.most_skipped > 0
        found, placed = self._placed(section, split)
        self._shards = [file.name for file in found]
        self.blocks = [len(each.keys) for each in placed if each.keys]
        self._shard_of = np.repeat(np.arange(len(placed)), [len(each.keys) for each in placed])
        self._keys = Texts(key for each in placed for key in each.keys)
        self._offsets, self._sizes, self._checks, self._classes = (
            np.concatenate(each) for each in list(zip(*placed, strict=True))[1:]
        )
        self.facts = self._facts(section, split)
        self._images = ImagePipeline(section, len(self), training=training)
        self._is_image = [section.is_image(field) for field in self._fields]

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def labels(self) -> Any:
        """The classes of the samples, int64 (N,), if all have one; where samples may be skipped, others are masked."""
        has_one = self._classes >= 0
        if _CLASS not in self._fields or not (has_one.all() or self._skips):
            return None
        return torch.from_numpy(self._classes) if has_one.all() else np.ma.MaskedArray(self._classes, ~has_one)

    def __getitem__(self, index: int, rng: np.random.Generator | None = None) -> tuple[Any, ...]:
        read: Files = {}
        first = sorted(range(len(self._fields)), key=lambda number: not self._is_image[number])
        values = {number: self._value(index, number, read, rng) for number in first}
        return tuple(values[number] for number in range(len(self._fields)))

    def collate(self, samples: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
        """Samples as a batch."""
        columns = zip(*samples, strict=True)
        return tuple(self._together(*column) for column in zip(self._fields, self._is_image, columns, strict=True))

    def on_device(self, batch: tuple[Any, ...]) -> tuple[Any, ...]:
        """A batch with normalized images."""
        columns = zip(batch, self._is_image, strict=True)
        return tuple(self._images.normalized(column) if is_image else column for column, is_image in columns)

    def _together(self, field: str, is_image: bool, values: Sequence[Any]) -> Any:
        if is_image:
            return self._images.batch(values)
        return list(values) if field.endswith(("json", "txt")) else default_collate(list(values))

    def _value(self, index: int, number: int, read: Files, rng: np.random.Generator | None) -> Any:
        if self._is_image[number]:
            return self._images.image(
                index, lambda: self._content(index, number, read), lambda: self._place(index, number), rng
            )
        is_image_kept = any(self._is_image) and not read  # and was read with the class, which is then that of the index
        if is_image_kept and self._fields[number] == _CLASS and self._classes[index] >= 0:
            return int(self._classes[index])
        content, extension = self._content(index, number, read), self._fields[number].rpartition(".")[2]
        try:
            return field_of(extension, content)
        except ValueError as error:
            raise DataError(f"{self._place(index, number)}: expected a file {extension}: {error}") from error

    def _content(self, index: int, number: int, read: Files) -> bytes:
        """A file's. Those of the same sample that lie near it are read along."""
        place = self._place(index, number)
        if not self._offsets[index, number]:
            raise DataError(
                f"{place}: expected the field {self._fields[number]}, for data.fields, found "
                f"{', '.join(self._extensions(index))}"
            )
        if number not in read:
            for numbers in self._read_together(index, number):
                read |= self._files(index, numbers, place)
            self._require_class(index, read)
        return read[number]

    def _read_together(self, index: int, number: int) -> list[list[int]]:
        """The fields to read for one of them: all that lie near each other, or that one, and the class by itself."""
        numbers = [
            other
            for other in np.flatnonzero(self._offsets[index]).tolist()
            if self._is_image[number] or not self._is_image[other]
        ]
        starts, sizes = self._offsets[index, numbers], self._sizes[index, numbers]
        if (starts + sizes).max() - starts.min() <= sizes.sum() + _BETWEEN:
            return [numbers]
        return [[other] for other in numbers if other == number or self._fields[other] == _CLASS]

    def _files(self, index: int, numbers: list[int], asked: str) -> Files:
        """Files of a sample by one reading, whose headers have to be those of the index."""
        shard = self._shards[self._shard_of[index]]
        starts, sizes = self._offsets[index, numbers].tolist(), self._sizes[index, numbers].tolist()
        first, end = min(starts) - BLOCK, max(map(sum, zip(starts, sizes, strict=True)))
        try:
            content = self._root.read(shard, first, end - first, whole=True)
        except DataError as error:
            raise DataError(f"{asked}: {error}") from error
        found = {}
        for number, start, size in zip(numbers, starts, sizes, strict=True):
            place = start - first
            if zlib.crc32(content[place - BLOCK : place]) != self._checks[index, number]:
                raise self._changed(index, number, f"it from byte {start:,} on, found another")
            found[number] = content[place : place + size]
        return found

    def _require_class(self, index: int, read: Files) -> None:
        """The class of the index has to be that of the shard, as samples are counted and drawn by it."""
        number, expected = self._fields.index(_CLASS) if _CLASS in self._fields else None, int(self._classes[index])
        if number in read and expected >= 0 and read[number].strip() != str(expected).encode():
            with suppress(ValueError):
                if class_of(read[number]) == expected:
                    return
            raise self._changed(index, number, f"the class {expected:,}, found {read[number][:20]!r}")

    def _changed(self, index: int, number: int, what: str) -> DataError:
        shard = self._root.place(self._shards[self._shard_of[index]])
        return DataError(
            f"{self._place(index, number)}: expected {what}: the shard has changed; write its index anew: raytorch "
            f"data index {shard}"
        )

    def _extensions(self, index: int) -> list[str]:
        """Of the files that a sample has."""
        shard = int(self._shard_of[index])
        first = int(np.searchsorted(self._shard_of, shard))
        return extensions_in(self._root.read(self._shards[shard] + SUFFIX), index - first)

    def _place(self, index: int, number: int) -> str:
        shard = self._root.place(self._shards[self._shard_of[index]])
        return f"{shard}: {self._keys[index]}.{self._fields[number]}"

    def _placed(self, section: ShardsData, split: str) -> tuple[list[File], list[Placed]]:
        """The shards of a split, and what is in each."""
        found = self._root.find(section.files_of(split), [".tar"])
        return found, [self._index(file) for file in found]

    def _index(self, file: File) -> Placed:
        place = self._root.place(file.name)
        try:
            content = self._root.read(file.name + SUFFIX)
        except DataError as error:
            raise DataError(f"{error}; write it: raytorch data index {place}") from error
        return read_index(content, file.size, self._fields, place)

    def _facts(self, section: ShardsData, split: str) -> dict[str, Any]:
        """The shape of images, and how many classes there are, which is by the training split."""
        facts: dict[str, Any] = {"input_shape": list(section.input_shape)} if section.input_shape else {}
        if _CLASS not in self._fields:
            return facts
        classes = [self._classes]
        if section.num_classes is None and list(section.files_of(split)) != list(section.files_of("train")):
            classes = [each.classes for each in self._placed(section, "train")[1]]
        number = section.num_classes or max((int(each.max()) for each in classes if len(each)), default=-1) + 1
        if (beyond := np.flatnonzero(self._classes >= number)).size:
            index = int(beyond[0])
            raise DataError(
                f"{self._place(index, self._fields.index(_CLASS))}: expected a class below {number:,}, for "
                f"data.num_classes or those of the training samples, found {self._classes[index]:,}"
            )
        return facts | {"num_classes": number}
