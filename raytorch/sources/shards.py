"""Tar shards in WebDataset's layout, read by position."""

import io
import json
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from raytorch.config.image_files import ShardsData
from raytorch.errors import DataError
from raytorch.sources.files import File, Root
from raytorch.sources.image_pipeline import ImagePipeline, stacked
from raytorch.sources.shard_index import SUFFIX, Placed, extensions_in, read_index
from raytorch.sources.tar_headers import BLOCK
from raytorch.sources.texts import Texts

_CLASS = "cls"


class Shards:
    """A batch is a tuple of the fields: images as of :class:`~raytorch.sources.images.Images`, classes int64 (B,),
    arrays as tensors (B, ...), and lists of texts and of what JSON has.
    """

    def __init__(self, section: ShardsData, split: str, training: bool) -> None:
        """Raises DataError for files that are not in order."""
        self._root, self._fields = Root.of(section), section.fields
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
    def labels(self) -> Tensor | None:
        """The classes of the samples, if all have one."""
        return torch.from_numpy(self._classes) if _CLASS in self._fields and (self._classes >= 0).all() else None

    def __getitem__(self, index: int, rng: np.random.Generator | None = None) -> tuple[Any, ...]:
        return tuple(self._value(index, number, rng) for number in range(len(self._fields)))

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
            return stacked(values)
        return list(values) if field.endswith(("json", "txt")) else default_collate(list(values))

    def _value(self, index: int, number: int, rng: np.random.Generator | None) -> Any:
        if self._is_image[number]:
            return self._images.image(
                index, lambda: self._content(index, number), lambda: self._place(index, number), rng
            )
        if self._fields[number] == _CLASS and self._classes[index] >= 0:
            return int(self._classes[index])
        content, extension = self._content(index, number), self._fields[number].rpartition(".")[2]
        try:
            return _decoded(extension, content)
        except (ValueError, EOFError, RecursionError) as error:
            raise DataError(f"{self._place(index, number)}: expected a file {extension}: {error}") from error

    def _content(self, index: int, number: int) -> bytes:
        """A file's, whose header has to be that of the index."""
        offset, size = int(self._offsets[index, number]), int(self._sizes[index, number])
        place = self._place(index, number)
        if not offset:
            raise DataError(
                f"{place}: expected the field {self._fields[number]}, for data.fields, found "
                f"{', '.join(self._extensions(index))}"
            )
        shard = self._shards[self._shard_of[index]]
        try:
            read = self._root.read(shard, offset - BLOCK, BLOCK + size, whole=True)
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
        if zlib.crc32(read[:BLOCK]) != self._checks[index, number]:
            raise DataError(
                f"{place}: expected it from byte {offset:,} on, found another: the shard has changed; write its index "
                f"anew: raytorch data index {self._root.place(shard)}"
            )
        return read[BLOCK:]

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


def _decoded(extension: str, content: bytes) -> Any:
    """A file's content by its extension. Raises ValueError and what else its decoder raises."""
    if extension == "npy":
        return torch.from_numpy(np.load(io.BytesIO(content), allow_pickle=False))
    if extension == "json":
        return json.loads(content)
    text = content.decode()
    if extension == "txt":
        return text
    if (number := int(text)) < 0:
        raise ValueError(f"a class is at least 0, not {number}")
    return number
