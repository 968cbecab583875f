"""Data sets of files of the user's own, each by the protocol that a data set of the user's own follows.

They are read as those are: see :mod:`raytorch.datasets.own`.
"""

from importlib import import_module
from typing import Any

from raytorch.config.sources import Source, TextData, Windows
from raytorch.errors import DataError
from raytorch.sources.files import AbsentFilesError, Root
from raytorch.sources.tokenizer import Tokenizer

SOURCES = {
    "arrays": "Arrays",
    "images": "Images",
    "shards": "Shards",
    "table": "Table",
    "text": "Text",
    "tokens": "Tokens",
}
"""The class of each source, by its name, which is its module's too."""


def open_source(section: Source, split: str, *, training: bool) -> Any:
    """The samples of a split of a source, changed at random, where its section says so, if they are for ``training``.

    The test split is the whole training split where the section takes a share of it. Raises DataError for files that
    are not in order.
    """
    source = getattr(import_module(f"{__name__}.{section.name}"), SOURCES[section.name])
    try:
        return source(section, split, training)
    except AbsentFilesError as error:
        if split != "test":
            raise
        raise DataError(
            f"{error}; name others as data.test, or a share of the training samples: data.test: 0.1"
        ) from None


def tokenizer_of(section: Windows) -> Tokenizer:
    """The tokenizer of a data set of tokens. Raises DataError if its file is not there, or another."""
    if isinstance(section, TextData):
        from raytorch.sources.tokenizing import open_tokenizer

        return open_tokenizer(section.tokenizer, Root.of(section))
    tokenizer: Tokenizer = open_source(section, "train", training=False).tokenizer
    return tokenizer
