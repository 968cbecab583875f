"""Data sets that are read from files of the user's own, in a folder or a store: folders of images, tables, tokens."""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from raytorch.config.reading_keys import ReadingKeys
from raytorch.config.section import ConflictError, Section

Name = Annotated[str, Field(min_length=1)]
Files = Name | Annotated[list[Name], Field(min_length=1)]
"""A file, a folder, or a pattern with ``*``, below the root; or several."""
Share = Annotated[float, Field(gt=0, lt=1)]


class _Located(Section):
    """A section whose name and files stand before the keys of how they are read."""

    name: str
    """The data set."""
    root: str = "data"
    """Folder or URI (``s3://...``) of the files; ``~`` is expanded."""
    train: Files = "train"
    """Files to train on, below ``root``: a folder, a file, a pattern such as ``part-*.parquet``, or a list of them."""
    validation: Files | None = None
    """Files of the validation split, for ``validation: {split: validation}`` of the run."""
    test: Files | Share = "test"
    """Files of the test split; or a share, as in 0.1, of the training samples, drawn by the seed and not trained on."""


class Source(ReadingKeys, _Located):
    """Base of the data sets that are read from files of the user's own."""

    kind: ClassVar[str | None] = None
    """The kind of a model's input; None for any."""
    input_shape: ClassVar[tuple[int, ...] | None] = None
    """Shape of a model's input; None where it is known when the files are read."""

    def files_of(self, split: str) -> Sequence[str]:
        """The files of a split, as they are named. Raises ConflictError for one that the section does not name.

        Example:
            >>> ArraysData(train=["a.npz", "b.npz"]).files_of("train")
            ['a.npz', 'b.npz']
        """
        named = self.train if split == "test" and self.test_share else {**vars(self)}.get(split)
        if split not in ("train", "validation", "test") or named is None:
            raise ConflictError(f"data {self.name} has no split {split}; name its files as data.{split}", split)
        return [named] if isinstance(named, str) else named

    @property
    def test_share(self) -> float | None:
        """The share of the training samples that is the test split; None if that has files of its own."""
        return self.test if isinstance(self.test, float) else None


class ArraysData(Source):
    """Arrays in files, memory-mapped: ``.npz`` or ``.safetensors`` files, or folders of ``.npy`` files."""

    name: Literal["arrays"] = "arrays"
    """The data set."""
    fields: list[Name] = ["x", "y"]
    """Names of the arrays that a batch is a tuple of, in its order. All have an entry for each sample."""


class TableData(Source):
    """Rows of parquet, CSV or Arrow IPC (Feather) files: a batch is their features, float32 (B, F), and the target."""

    name: Literal["table"] = "table"
    """The data set."""
    target: Name = "target"
    """Column that is to be foretold."""
    features: Annotated[list[Name], Field(min_length=1)] | None = None
    """Columns to foretell it from, in this order, or patterns with ``*``; all others by default."""
    ignore: list[Name] = []
    """Columns, or patterns with ``*``, that are no features where ``features`` would take them: a row's number, say."""
    task: Literal["regression", "classification"] | None = None
    """What the target is; by default classes where it is text, true or false or whole numbers, else a number."""
    missing: Literal["error", "mean", "zero"] = "error"
    """What takes the place of a number that is missing; ``mean`` is that of the training files."""
    categories: Literal["error", "codes", "one_hot"] = "error"
    """What text becomes: its number among the sorted values of the training files, or a column for each of them."""
    unknown: Literal["error", "other"] = "error"
    """Text that the training files do not have: an error, or a code, or column, of its own."""
    standardize: bool = False
    """Take the mean of each column of numbers from it and divide by its standard deviation, of the training files."""

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.target in (self.features or []):
            raise ConflictError(f"{self.target} is the target, and cannot be a feature as well", "features", "target")
        if self.unknown == "other" and self.categories == "error":
            raise ConflictError("unknown: other goes with categories: codes or one_hot", "unknown", "categories")
        return self
