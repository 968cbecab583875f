"""Data sets that are read from files of the user's own, in a folder or a store: folders of images, tables, tokens."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from raytorch.config.reading_keys import ReadingKeys
from raytorch.config.section import ConflictError, Section

Name = Annotated[str, Field(min_length=1)]
_FileName = Annotated[
    str, Field(min_length=1, json_schema_extra={"patternErrorMessage": "the name of a file, a folder or a pattern"})
]
Files = _FileName | Annotated[list[_FileName], Field(min_length=1)]
"""A file, a folder, or a pattern with ``*`` or ``{000..003}``, below the root; or several."""
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


class _Located(Section):
    """A section whose name and files stand before the keys of how they are read."""

    name: str
    """The data set."""
    root: str = "data"
    """Folder or URI (``s3://...``) of the files, from the current folder unless it is in full; ``~`` is expanded."""
    train: Files = "train"
    """Files to train on, below ``root``: a folder, a file, a pattern such as ``part-*.parquet``, or a list of them."""
    validation: Files | None = None
    """Files of the validation split, for ``validation: {split: validation}`` of the run."""
    test: Files | Share = "test"
    """Files of the test split; or a share, as in 0.1, of the training samples, drawn by the seed and not trained on."""
    cache_folder: FullPath | None = None
    """Folder on each node that all its processes share, for whole files of a store; by default a temporary one."""
    cache_size: Size | None = None
    """Bytes in it at most, a number or text such as ``20GB``; by default half of what its disk has room for."""


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
    def has_root(self) -> bool:
        """Whether it has files below ``root`` at all."""
        return True

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

    kind: ClassVar[str | None] = "rows"
    name: Literal["table"] = "table"
    """The data set."""
    target: Name = "target"
    """Column that is to be foretold."""
    features: Annotated[list[Name], Field(min_length=1)] | None = None
    """Columns to foretell it from, in this order, or patterns with ``*``; all others by default."""
    ignore: list[Name] = []
    """Columns, or patterns with ``*``, that are no features where ``features`` would take them: a row's number, say."""
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    """What stands between the columns of CSV files, ``;`` say; by default a comma, and a tab in .tsv."""
    task: Literal["regression", "classification"] | None = None
    """What the target is; by default classes where it is text, true or false or whole numbers, else a number."""
    missing: Literal["error", "mean", "zero"] = "error"
    """What takes the place of a number that is missing; ``mean`` is that of the training files."""
    categories: Literal["error", "codes", "one_hot"] = "error"
    """What text becomes: its number among the sorted values of the training files, or a column for each of them."""
    categorical: list[Name] = []
    """Columns, or patterns with ``*``, whose numbers are categories as text is: postcodes, say. What else is text is
    refused where nearly all of it are numbers."""
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
        if self.categorical and self.categories == "error":
            raise ConflictError("categorical goes with categories: codes or one_hot", "categorical", "categories")
        if self.target in self.categorical:
            raise ConflictError(f"{self.target} is the target; set task: classification", "categorical", "target")
        return self


PYDOC = "pydoc_data.topics"
"""In place of files: the help texts that every Python carries."""


class Windows(Source):
    """Base of the data sets of tokens."""

    kind: ClassVar[str | None] = "tokens"
    context: PositiveInt = 256
    """Tokens of a sample."""
    documents: Literal["packed", "apart"] = "packed"
    """Samples of all documents in a row, or of one document each, whose last is padded: targets of padding are -100."""


class TokensData(Windows):
    """Token ids in files, memory-mapped, as ``raytorch data tokenize`` writes them."""

    name: Literal["tokens"] = "tokens"
    """The data set."""
    train: Files = "train.tokens"
    """Files to train on, below ``root``: a folder, a file, a pattern such as ``part-*.tokens``, or a list of them."""
    validation: Files | None = "validation.tokens"
    """Files of the validation split, for ``validation: {split: validation}`` of the run."""
    test: Files | Share = "test.tokens"
    """Files of the test split; or a share, as in 0.1, of the training samples: the end of them, not trained on."""


class TextData(Windows):
    """Text in files, written as tokens into a folder of each machine when it is first used."""

    name: Literal["text"] = "text"
    """The data set."""
    train: Files = PYDOC
    """Files to train on, below ``root``: folders of .txt and .jsonl, files, patterns with ``*``, or a list of them. The
    default stands for the help texts that every Python carries, and needs no files."""
    test: Files | Share = 0.1
    """Files of the test split; or a share, as in 0.1, of the training samples: the end of the text, not trained on."""
    tokenizer: Name = "bytes"
    """``bytes``, the bytes of UTF-8, or a ``tokenizer.json`` of the package tokenizers, below ``root``."""
    document_per: Literal["file", "line", "paragraph"] = "file"
    """What of a file of plain text is a document; paragraphs have empty lines between them."""
    key: Name = "text"
    """Where the text is in each line of a .jsonl file, which is a document."""
    tokens_folder: (
        Annotated[str, Field(pattern=r"^[/~]", json_schema_extra={"patternErrorMessage": "a path in full"})] | None
    ) = None
    """Folder of the tokens on each machine, in full; by default ``~/.cache/raytorch/tokens``."""

    @property
    def has_root(self) -> bool:
        splits = (self.train, self.validation, self.test)
        return self.tokenizer != "bytes" or any(
            each not in (PYDOC, None) and not isinstance(each, float) for each in splits
        )
