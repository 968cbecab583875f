"""Files of token ids, memory-mapped."""

from collections.abc import Sequence
from functools import cached_property

from raytorch.config.sources import TokensData
from raytorch.errors import DataError
from raytorch.sources.files import Root
from raytorch.sources.token_files import SUFFIX, TokenFile
from raytorch.sources.tokenizer import Tokenizer
from raytorch.sources.tokenizing import TOKENIZER_FILE, open_tokenizer
from raytorch.sources.windows import TokenWindows, require_one_coding


class Tokens(TokenWindows):
    """Windows over the files of a split. They are of the same tokenizer as those that are trained on."""

    def __init__(self, section: TokensData, split: str, training: bool) -> None:
        """Raises DataError for files that are not in order."""
        self._root = Root.of(section)
        self._names = [file.name for file in self._root.find(section.files_of(split), [SUFFIX])]
        files = self._opened(section, split)
        if split != "train":
            require_one_coding([*self._opened(section, "train"), *files])
        super().__init__(files, section.context, section.documents)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens. Raises DataError if their tokenizer is not beside them."""
        return self.tokenizer.decode(tokens)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """That of the files. Raises DataError if it is not beside them."""
        header = self._files[0].header
        folder = self._names[0].rpartition("/")[0]
        name = "bytes" if header.tokenizer == "bytes" else f"{folder}/{TOKENIZER_FILE}".lstrip("/")
        tokenizer = open_tokenizer(name, self._root)
        if tokenizer.sha256 != header.tokenizer_sha256:
            raise DataError(f"{self._root.place(name)}: is another tokenizer than that of {self._files[0].place}")
        return tokenizer

    def _opened(self, section: TokensData, split: str) -> list[TokenFile]:
        return [TokenFile(self._root, file) for file in self._root.find(section.files_of(split), [SUFFIX])]
