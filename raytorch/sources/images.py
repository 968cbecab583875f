"""Images in a folder for each class, or named by a table with their classes."""

import io
from collections.abc import Iterator, Mapping, Sequence
from posixpath import dirname, isabs, join, normpath
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyarrow import csv
from torch import Tensor

from raytorch.config.image_files import ImagesData
from raytorch.errors import DataError
from raytorch.sources.files import Root
from raytorch.sources.image_decoding import SUFFIXES
from raytorch.sources.image_pipeline import ImagePipeline
from raytorch.sources.texts import Texts

_TABLE = ".csv"


class Images:
    """A sample is an image, uint8 (H, W, 3), and the number of its class; a batch is ``(images, classes)``.

    Images of a batch are uint8 (B, 3, H, W) until they are on the device, and classes int64 (B,).
    """

    def __init__(self, section: ImagesData, split: str, training: bool) -> None:
        """Raises DataError for files that are not in order."""
        self._root = Root.of(section)
        found = list(self._found(section, split))
        self._names = Texts(name for name, _ in found)
        self.classes = section.classes or _sorted({label for _, label in self._of_training(section, split, found)})
        numbers = {label: number for number, label in enumerate(self.classes)}
        self.labels = torch.tensor([self._number_of(name, label, numbers) for name, label in found])
        self._labels = self.labels.numpy()  # in which a look-up takes a tenth of the time
        self._pipeline = ImagePipeline(section, len(found), training=training)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def facts(self) -> dict[str, Any]:
        """The shape of a model's input, and the classes, which are those of the training split."""
        return {
            "input_shape": [3, *self._pipeline.size],
            "num_classes": len(self.classes),
            "classes": list(self.classes),
        }

    def __getitem__(self, index: int, rng: np.random.Generator | None = None) -> tuple[Tensor, int]:
        image = self._pipeline.image(
            index, lambda: self._root.read(self._names[index]), lambda: self._place(index), rng
        )
        return image, int(self._labels[index])

    def collate(self, samples: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        """Samples as a batch."""
        return self._pipeline.batch([image for image, _ in samples]), torch.tensor([label for _, label in samples])

    def on_device(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """A batch with normalized images."""
        images, labels = batch
        return self._pipeline.normalized(images), labels

    def _place(self, index: int) -> str:
        return self._root.place(self._names[index])

    def _of_training(self, section: ImagesData, split: str, found: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        is_training = list(section.files_of(split)) == list(section.files_of("train"))
        return iter(found) if is_training else self._found(section, "train")

    def _found(self, section: ImagesData, split: str) -> Iterator[tuple[str, str]]:
        """Names of files and classes."""
        for named in section.files_of(split):
            if named.endswith(_TABLE):
                for table in self._root.find([named]):
                    yield from self._listed(table.name, section)
            else:
                yield from self._in_folders(named)

    def _in_folders(self, named: str) -> Iterator[tuple[str, str]]:
        above = "" if normpath(named) == "." else f"{normpath(named)}/"
        for file in self._root.find([named], SUFFIXES):
            below = normpath(file.name).removeprefix(above)
            label = dirname(file.name).rpartition("/")[2] if "*" in named else below.partition("/")[0]
            if not label or label == below:
                raise DataError(
                    f"{self._root.place(file.name)}: expected a folder for each class, as in {named}/CLASS/image.jpg, "
                    "found an image that is in none"
                )
            yield file.name, label

    def _listed(self, table: str, section: ImagesData) -> Iterator[tuple[str, str]]:
        columns = section.path_column, section.label_column
        content, where = self._root.read(table), self._root.place(table)
        try:
            names = csv.open_csv(io.BytesIO(content)).schema.names
            for key, column in zip(("path_column", "label_column"), columns, strict=True):
                if column not in names:
                    raise DataError(f"{where}: expected the column {column}, for data.{key}, found {', '.join(names)}")
            as_text = csv.ConvertOptions(include_columns=columns, column_types=dict.fromkeys(columns, pa.string()))
            read = csv.read_csv(io.BytesIO(content), convert_options=as_text)
        except pa.ArrowInvalid as error:
            raise DataError(f"{where}: expected a table: {error}") from error
        for row, (path, label) in enumerate(zip(*(read[column].to_pylist() for column in columns), strict=True), 1):
            if not path or not label or isabs(path) or ".." in path.split("/"):
                raise DataError(
                    f"{where}: row {row:,}: expected a path from the table's folder on and a class, found {path!r} and "
                    f"{label!r}"
                )
            yield join(dirname(table), path), label

    def _number_of(self, name: str, label: str, numbers: Mapping[str, int]) -> int:
        if label not in numbers:
            known = ", ".join([*self.classes[:20], *(["..."] if len(self.classes) > 20 else [])])
            raise DataError(
                f"{self._root.place(name)}: expected one of the training samples' classes, {known}; found {label}"
            )
        return numbers[label]


def _sorted(labels: set[str]) -> list[str]:
    """By their names, or, where all are numbers, by those, and of 7 and 007 by their names again."""
    return sorted(labels, key=(lambda label: (int(label), label)) if all(map(str.isdecimal, labels)) else None)
