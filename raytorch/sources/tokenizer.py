"""Tokenizers: text to whole numbers and back. Imports no torch."""

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from raytorch.errors import DataError, needing_extra

Array = np.ndarray[Any, Any]

END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "[SEP]")
"""The names by which an end-of-document token is known, unless one is given."""
_UNKNOWN = "\ufffd"
"""In the place of what is no character, or not yet."""
_LONGEST = 4
"""Bytes of a character at most, each of which may be a token."""


class Tokenizer(Protocol):
    """What encodes text."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def sha256(self) -> str:
        """The digest of all that it depends on."""

    @property
    def file(self) -> bytes | None:
        """The file that it is made of."""

    @property
    def vocabulary(self) -> int:
        """One more than the largest token."""

    @property
    def end_token(self) -> int:
        """What stands behind each document."""

    def encode(self, texts: Sequence[str]) -> list[Array]:
        """The tokens of each text, (N,)."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens, without those that end documents."""


class ByteTokenizer:
    """The bytes of UTF-8.

    Example:
        >>> ByteTokenizer().encode(["hi"])
        [array([104, 105], dtype=uint8)]
    """

    name = "bytes"
    sha256 = hashlib.sha256(b"bytes").hexdigest()
    file = None
    vocabulary = 257
    end_token = 256

    def encode(self, texts: Sequence[str]) -> list[Array]:
        """See :class:`Tokenizer`."""
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        """See :class:`Tokenizer`; bytes that are no UTF-8 are shown as such."""
        return bytes(token for token in tokens if token < self.end_token).decode(errors="replace")


class JsonTokenizer:
    """One of the package ``tokenizers``, as its ``tokenizer.json`` describes it."""

    def __init__(self, content: bytes, place: str, end_token: str | None = None) -> None:
        """``content`` is of the file at ``place``, ``end_token`` what its token behind each document is called.

        By default that is one of :data:`END_TOKENS`, or without one a token of its own behind the vocabulary. Raises
        DataError, and MissingPackageError.
        """
        with needing_extra("text"):
            import tokenizers
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the package raises no other
            raise DataError(f"{place}: expected a tokenizer.json of the package tokenizers: {error!s:.200}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.name, self.file = place.rpartition("/")[2], content
        self.sha256 = hashlib.sha256(content).hexdigest()
        known: dict[str, int] = self._tokenizer.get_vocab()
        self.vocabulary = max(known.values(), default=-1) + 1
        if end_token is not None and end_token not in known:
            raise DataError(f"{place}: has no token {end_token!r} to end documents with")
        names = END_TOKENS if end_token is None else (end_token,)
        self.end_token = next((known[name] for name in names if name in known), self.vocabulary)
        self.vocabulary = max(self.vocabulary, self.end_token + 1)

    def encode(self, texts: Sequence[str]) -> list[Array]:
        """See :class:`Tokenizer`."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(each.ids, np.uint32) for each in encoded]

    def decode(self, tokens: Sequence[int]) -> str:
        """See :class:`Tokenizer`."""
        text: str = self._tokenizer.decode([token for token in tokens if token != self.end_token])
        return text


class Decoding:
    """The text of tokens that come one after the other, each character as soon as all of it is there.

    Example:
        >>> decoding = Decoding(ByteTokenizer())
        >>> [decoding.add(byte) for byte in "hö".encode()]
        ['h', '', 'ö']
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._told: list[int] = []
        """The newest of which the text is told; the text of a token may depend on what is before it."""
        self._waiting: list[int] = []

    def add(self, token: int) -> str:
        """What a token adds."""
        self._waiting.append(token)
        return self._new(is_last=False)

    def end(self) -> str:
        """What is left of a character that is not whole."""
        return self._new(is_last=True)

    def _new(self, *, is_last: bool) -> str:
        before = self._tokenizer.decode(self._told)
        text = self._tokenizer.decode(self._told + self._waiting)[len(before) :]
        if not text or (text.endswith(_UNKNOWN) and len(self._waiting) < _LONGEST and not is_last):
            return ""
        self._told, self._waiting = self._waiting, []
        return text
