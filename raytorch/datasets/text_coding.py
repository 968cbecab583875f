"""Text to the tokens of a model and back, by the tokenizer that its data had."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raytorch.config.sources import Windows
from raytorch.errors import DataError, Remedy
from raytorch.sources import tokenizer_of
from raytorch.sources.tokenizer import ByteTokenizer, Decoding, JsonTokenizer, Tokenizer


class TextCoding:
    """A tokenizer, and the token that ends documents."""

    def __init__(self, tokenizer: Tokenizer, end_token: int) -> None:
        self._tokenizer, self.end_token = tokenizer, end_token

    @classmethod
    def of(cls, facts: Mapping[str, Any], data: Any = None, file: Path | None = None) -> "TextCoding":
        """That of a model whose data had these ``facts``.

        Args:
            facts: What the data said of itself.
            data: The section of the data, beside whose files it is looked for.
            file: A ``tokenizer.json`` to take in place of that.

        Raises:
            DataError: It is not there, or is another than that of the data.
        """
        if "tokenizer" not in facts or type(facts.get("end_token")) is not int:
            raise DataError("the model is not one of tokens: its data had no facts tokenizer and end_token")
        tokenizer = _found(facts, data, file)
        if tokenizer.sha256 != facts.get("tokenizer_sha256"):
            raise DataError(
                f"{file or tokenizer.name}: is another tokenizer than that of the data that the model was trained on",
                remedies=[Remedy("tokenizer")],
            )
        return cls(tokenizer, facts["end_token"])

    def encode(self, text: str) -> list[int]:
        """The tokens of a text. Raises DataError for what is none, such as bytes of another coding."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(f"{text!r:.80} is no text in UTF-8") from None
        return [int(token) for token in self._tokenizer.encode([text])[0]]

    def decoding(self) -> Decoding:
        """What tells the text of tokens that come one after the other."""
        return Decoding(self._tokenizer)


def _found(facts: Mapping[str, Any], data: Any, file: Path | None) -> Tokenizer:
    if file is not None:
        try:
            return JsonTokenizer(file.read_bytes(), str(file))
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror}", remedies=[Remedy("tokenizer")]) from None
    if facts["tokenizer"] == "bytes":
        return ByteTokenizer()
    missing = f"the model's tokenizer, {str(facts['tokenizer'])!r:.80},"
    if not isinstance(data, Windows):
        raise DataError(f"{missing} is in a file of its own; give that", remedies=[Remedy("tokenizer")])
    try:
        return tokenizer_of(data)
    except DataError as error:
        raise DataError(f"{missing} is not with the data: {error}", remedies=[Remedy("tokenizer")]) from None
