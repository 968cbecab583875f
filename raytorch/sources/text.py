"""Files of text, whose tokens are written into a folder of this machine when they are first used."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from pydoc_data.topics import topics

from raytorch.config.sources import PYDOC, TextData
from raytorch.errors import DataError
from raytorch.sources.documents import SUFFIXES, Documents, Piece, TextFile
from raytorch.sources.files import File, Root
from raytorch.sources.token_files import MAGIC, SUFFIX, VERSION, TokenFile, TokenWriter
from raytorch.sources.tokenizer import Tokenizer
from raytorch.sources.tokenizing import locked, open_tokenizer, require_documents, write_tokens
from raytorch.sources.windows import TokenWindows

_RULES = 1
"""Of how text becomes documents and tokens: others need other files."""


class Text(TokenWindows):
    """Windows over the text of a split."""

    def __init__(self, section: TextData, split: str, training: bool) -> None:
        """Writes its tokens if they are not there. Raises DataError for files that are not in order."""
        self._section, self._root = section, Root.of(section)
        text = _Pydoc() if section.files_of(split) == [PYDOC] else _Files(section, self._root, split)
        super().__init__([self._written(text)], section.context, section.documents)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens."""
        return self._tokenizer.decode(tokens)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return open_tokenizer(self._section.tokenizer, self._root)

    def _written(self, text: "_Pydoc | _Files") -> TokenFile:
        """The file of the tokens. Of the processes that want it one writes it, and the others wait."""
        what = [text.version(), self._tokenizer.sha256, MAGIC.decode(), VERSION, _RULES]
        folder, digest = cache_folder(self._section), hashlib.sha256(json.dumps(what).encode()).hexdigest()
        path = folder / f"{digest[:32]}{SUFFIX}"
        try:
            if not path.is_file():
                folder.mkdir(parents=True, exist_ok=True)
                with locked(path.with_suffix(".lock")):
                    if not path.is_file():
                        self._write(text, path)
            return TokenFile(Root(str(folder)), File(path.name, path.stat().st_size))
        except OSError as error:
            raise DataError(
                f"{folder}: cannot hold the tokens: {error}; name another folder as data.tokens_folder"
            ) from error

    def _write(self, text: "_Pydoc | _Files", path: Path) -> None:
        with TokenWriter(path, self._tokenizer) as writer:
            write_tokens(text.files(), self._tokenizer, {"train": writer})
            require_documents({"train": writer.header}, {})


def cache_folder(section: TextData) -> Path:
    """Where the tokens are on this machine."""
    if section.tokens_folder is not None:
        return Path(section.tokens_folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "raytorch" / "tokens"


class _Files:
    """Those of a split."""

    def __init__(self, section: TextData, root: Root, split: str) -> None:
        self._section, self._root = section, root
        self._files = root.find(section.files_of(split), SUFFIXES)

    def version(self) -> list[object]:
        """What changes when they do."""
        section = self._section
        stamps = [(file.name, file.size, self._root.stamp(file.name)) for file in self._files]
        return [self._root.in_full, stamps, section.document_per, section.key]

    def files(self) -> Iterator[Documents]:
        """What is read."""
        section = self._section
        for file in self._files:
            yield TextFile(self._root, file, document_per=section.document_per, key=section.key)


class _Pydoc:
    """The help texts that every Python carries, one a document. They are others in another version of Python."""

    position = 0

    def version(self) -> str:
        """See :class:`_Files`."""
        return hashlib.sha256(json.dumps(topics, sort_keys=True).encode()).hexdigest()

    def files(self) -> Iterator[Documents]:
        """See :class:`_Files`."""
        yield self

    def pieces(self) -> Iterator[Piece]:
        """See :class:`TextFile`."""
        for _, text in sorted(topics.items()):
            yield text, True
