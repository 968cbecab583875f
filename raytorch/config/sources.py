"""Data sets that are read from files of the user's own, in a folder or a store: folders of images, tables, tokens."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt

from raytorch.config.own_parts import Readers
from raytorch.config.section import ConflictError, Section

Name = Annotated[str, Field(min_length=1)]
Files = Name | Annotated[list[Name], Field(min_length=1)]
"""A file, a folder, or a pattern with ``*``, below the root; or several."""
FullPath = Annotated[str, Field(pattern=r"^[/~]", json_schema_extra={"patternErrorMessage": "a path in full"})]
Share = Annotated[float, Field(gt=0, lt=1)]
UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
Size = (
    PositiveInt
    | Annotated[
        str,
        Field(
            pattern=r"^[0-9]{1,15}(\.[0-9]{1,3})? ?([kMGT]i?)?B$",
            json_schema_extra={"patternErrorMessage": "text such as 20GB or 1.5 TiB"},
        ),
    ]
)


class Source(Section):
    """Base of the data sets that are read from files of the user's own."""

    kind: ClassVar[str | None] = None
    """The kind of a model's input; None for any."""
    input_shape: ClassVar[tuple[int, ...] | None] = None
    """Shape of a model's input; None where it is known when the files are read."""

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
    readers: Readers = 0
    cache_folder: FullPath | None = None
    """Folder on each node that all its processes share, for whole files of a store; by default a temporary one."""
    cache_size: Size | None = None
    """Bytes in it at most, a number or text such as ``20GB``; by default half of what its disk has room for."""

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
    def cache_bytes(self) -> int | None:
        """The bound of the cache in bytes; None for the default.

        Example:
            >>> ArraysData(cache_size="1.5 kB").cache_bytes
            1500
        """
        if not isinstance(self.cache_size, str):
            return self.cache_size
        number, unit = self.cache_size.removesuffix("B").rstrip("kMGTi "), self.cache_size.lstrip("0123456789. ")
        return max(1, round(Fraction(number) * UNITS[unit.removesuffix("B")]))

    @property
    def test_share(self) -> float | None:
        """The share of the training samples that is the test split; None if that has files of its own."""
        return self.test if isinstance(self.test, float) else None


class ArraysData(Source):
    """Arrays in files, memory-mapped: a folder of ``.npy`` files, one for each field of a sample."""

    name: Literal["arrays"] = "arrays"
    """The data set."""
    fields: list[Name] = ["x", "y"]
    """Names of the arrays that a batch is a tuple of, in its order. All have an entry for each sample."""
