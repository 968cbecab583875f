"""Text that a trained model writes."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from raytorch.config.own_code import Code
from raytorch.datasets.text_coding import TextCoding
from raytorch.errors import DataError, UserError
from raytorch.models.generation import generate
from raytorch.models.networks import Architecture
from raytorch.runs.plan import recorded_config
from raytorch.runs.storage import RunFolder
from raytorch.serialization import load_model, read_architecture
from raytorch.training.export import load_run


class TextWriter:
    """A model that goes on with texts.

    Example:
        >>> writer = TextWriter.of_run(find_run("text_gpt-20261128-120000", "runs"))
        >>> "".join(writer.write("The ", tokens=100, temperature=0.8, seed=1))
    """

    def __init__(self, model: nn.Module, architecture: Architecture, coding: TextCoding) -> None:
        """Raises DataError for a model that does not read tokens."""
        facts = architecture.facts
        if any(type(facts.get(name)) is not int or facts[name] < 1 for name in ("context", "vocabulary")):
            raise DataError("the model is not one of tokens: its data had no facts context and vocabulary")
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model, self._coding = model.to(self._device).eval(), coding
        self._context, self._vocabulary = facts["context"], facts["vocabulary"]

    @classmethod
    def of_run(cls, folder: RunFolder, *, tokenizer: Path | None = None, code: Code = None) -> "TextWriter":
        """The model of a run's latest checkpoint.

        Args:
            folder: The run.
            tokenizer: The file of its tokenizer; by default it is looked for where the run's data is.
            code: Of a model of your own the file or folder that has its code.

        Raises:
            DataError: Its tokenizer is not there, or another; or it does not read tokens.
            UserError: As :func:`~raytorch.training.export.load_run` does.
        """
        model, architecture = load_run(folder, code)
        return cls(model, architecture, TextCoding.of(architecture.facts, recorded_config(folder).data, tokenizer))

    @classmethod
    def of_file(cls, path: Path, *, tokenizer: Path | None = None, code: Code = None) -> "TextWriter":
        """The model of a file that ``raytorch export --format safetensors`` has written. Raises as :meth:`of_run`."""
        architecture = read_architecture(path, code=code)
        return cls(load_model(path, code=code), architecture, TextCoding.of(architecture.facts, None, tokenizer))

    def write(
        self, prompt: str, *, tokens: int, temperature: float = 1.0, top_k: int | None = None, seed: int = 0
    ) -> Iterator[str]:
        """Go on with a text, piece by piece, until a document ends.

        Args:
            prompt: The text; without any a new document is begun.
            tokens: How many are written at most.
            temperature: What the logits are divided by before a token is drawn; 0 takes the likeliest.
            top_k: Among how many of the likeliest a token is drawn; None is all.
            seed: Of what is drawn: the same writes the same, on the same device.

        Raises:
            UserError: A number is out of its range, or the prompt is no text.
        """
        if tokens < 1 or not temperature >= 0 or (top_k is not None and top_k < 1):
            raise UserError("give tokens and top_k of at least 1, and a temperature of at least 0")
        begin = self._coding.encode(prompt) or [self._coding.end_token]
        if not all(0 <= token < self._vocabulary for token in begin):
            raise DataError("the tokenizer has tokens that the model does not know")
        written = generate(
            self._model,
            torch.tensor([begin], device=self._device),
            self._context,
            temperature=temperature,
            top_k=top_k,
            generator=torch.Generator(self._device).manual_seed(seed),
        )
        decoding = self._coding.decoding()
        for following in islice(written, tokens):
            if (token := int(following)) == self._coding.end_token:
                break
            if text := decoding.add(token):
                yield text
        if text := decoding.end():
            yield text
