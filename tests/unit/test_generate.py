"""`raytorch generate`: what a model writes, in which tokens, and what is refused."""

import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from lone_runs import train, without_ray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

from raytorch.cli.main import main
from raytorch.config import GptModel
from raytorch.config.file import dump_config, from_data
from raytorch.datasets.text_coding import TextCoding
from raytorch.errors import DataError, UserError
from raytorch.models.generation import generate
from raytorch.models.gpt import Gpt
from raytorch.models.networks import Architecture
from raytorch.runs.storage import RunFolder
from raytorch.serialization import save_model
from raytorch.sources.tokenizer import ByteTokenizer, Decoding, JsonTokenizer
from raytorch.training.writing import TextWriter

BYTES: dict[str, Any] = {
    "vocabulary": 257,
    "context": 16,
    "end_token": 256,
    "tokenizer": "bytes",
    "tokenizer_sha256": ByteTokenizer.sha256,
}
SIZES = {"dim": 16, "heads": 2, "layers": 2}


def built(facts: dict[str, Any] = BYTES) -> tuple[Architecture, Gpt]:
    torch.manual_seed(0)
    architecture = Architecture(GptModel(**SIZES), facts=facts)
    model = architecture.build().eval()
    assert isinstance(model, Gpt)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return architecture, model


def saved(root: Path, facts: dict[str, Any] = BYTES, data: Any = "text") -> RunFolder:
    """What a finished run has left of its model."""
    folder = RunFolder(str(root / "runs"), "mine")
    folder.make()
    checkpoint = Path(folder.path) / "checkpoint_00000007"
    checkpoint.mkdir(parents=True)
    config = from_data({"name": "mine", "epochs": 1, "data": data, "model": {"name": "gpt", **SIZES}})
    folder.write_text("config.yaml", dump_config(config))
    weights = checkpoint / "model.safetensors"
    architecture, model = built(facts)
    save_model(model, weights, architecture)
    manifest = {"format": 1, "step": 7, "files": {weights.name: weights.stat().st_size}}
    (checkpoint / "checkpoint.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def facts_of(file: Path) -> dict[str, Any]:
    """Those of data that has a tokenizer of this file."""
    known = JsonTokenizer(file.read_bytes(), str(file))
    sizes = {"vocabulary": known.vocabulary, "context": 16, "end_token": known.end_token}
    return {**sizes, "tokenizer": known.name, "tokenizer_sha256": known.sha256}


class Follower(nn.Module):
    """A model that keeps nothing: what follows a byte of a text is the text's next byte, and the end its last's."""

    def __init__(self, text: bytes) -> None:
        super().__init__()
        self.following = dict(zip([256, *text], [*text, 256], strict=True))

    def forward(self, tokens: Tensor) -> Tensor:
        following = torch.tensor([[self.following.get(int(token), 256) for token in row] for row in tokens])
        return nn.functional.one_hot(following, 257).float() * 50


def writer_of(text: str) -> TextWriter:
    return TextWriter(Follower(text.encode()), Architecture(GptModel(), facts=BYTES), TextCoding.of(BYTES))


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The status that ``raytorch generate`` exits with."""
    monkeypatch.setattr(sys, "argv", ["raytorch", "generate", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


# -- tokens ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [5, 40])
def test_each_token_is_the_likeliest_behind_all_that_are_in_the_context(length: int) -> None:
    _, model = built()
    prompt = torch.randint(257, (3, length), generator=torch.Generator().manual_seed(2))
    window, written = prompt[:, -16:], []
    for _ in range(14):
        if window.shape[1] > 16:
            window = window[:, -8:]
        written.append(model(window)[:, -1].argmax(1))
        window = torch.cat([window, written[-1][:, None]], 1)
    assert len(torch.stack(written).unique()) > 5
    found = list(islice(generate(model, prompt, 16, temperature=0), 14))
    assert torch.equal(torch.stack(found), torch.stack(written))
    without_keeping = generate(nn.Sequential(model), prompt, 16, temperature=0)
    assert torch.equal(torch.stack(list(islice(without_keeping, 14))), torch.stack(written))


def drawn(temperature: float, top_k: int | None, seed: int = 0) -> Tensor:
    """How often each of four tokens is drawn whose logits are 0, 1, 2 and 3."""

    class Steady(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return torch.arange(4.0).expand(*tokens.shape, 4)

    written = generate(
        Steady(),
        torch.zeros(20_000, 1, dtype=torch.int64),
        4,
        temperature=temperature,
        top_k=top_k,
        generator=torch.Generator().manual_seed(seed),
    )
    return torch.bincount(next(written), minlength=4) / 20_000


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, 2), (2.0, 3), (1.0, 9)])
def test_tokens_are_drawn_by_temperature_among_the_likeliest(temperature: float, top_k: int | None) -> None:
    logits = torch.arange(4.0) / temperature
    logits[: max(0, 4 - (top_k or 4))] = -torch.inf
    found = drawn(temperature, top_k)
    torch.testing.assert_close(found, logits.softmax(0), atol=0.015, rtol=0)
    assert torch.equal(found, drawn(temperature, top_k))
    assert not torch.equal(found, drawn(temperature, top_k, seed=1))


def test_a_prompt_has_a_token() -> None:
    with pytest.raises(ValueError, match=r"at least one token, \(B, T\), not \(2, 0\)"):
        next(generate(nn.Identity(), torch.zeros(2, 0, dtype=torch.int64), 4))


# -- text --------------------------------------------------------------------------------------------------------------


def byte_level() -> Tokenizer:
    """One whose tokens are parts of characters, as GPT-2's may be."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: number for number, letter in enumerate([*letters, "<|endoftext|>"])}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return made


@pytest.mark.parametrize("kind", ["bytes", "byte level"])
def test_a_character_is_told_when_all_of_it_is_there(kind: str) -> None:
    tokenizer: Any = ByteTokenizer()
    if kind != "bytes":
        tokenizer = JsonTokenizer(byte_level().to_str().encode(), "tokenizer.json")
    for text in ("hi", "öäü", "a€b", "🙂🙃", " two  spaces "):
        decoding = Decoding(tokenizer)
        parts = [decoding.add(int(token)) for token in tokenizer.encode([text])[0]]
        assert "".join(parts) == text
        assert decoding.end() == ""
    decoding = Decoding(tokenizer)
    (half,) = tokenizer.encode(["€"])
    assert ([decoding.add(int(token)) for token in half[:2]], decoding.end()) == (["", ""], "\ufffd")


def test_bytes_that_are_no_text_do_not_hold_up_what_follows() -> None:
    decoding = Decoding(ByteTokenizer())
    parts = [decoding.add(byte) for byte in [255, 255, 255, 255, 255, *b"ok"]]
    assert "".join(parts).endswith("ok")
    assert "".join(parts).startswith("\ufffd" * 4)


def test_a_text_goes_on_until_its_document_ends() -> None:
    writer = writer_of("héy!")
    assert "".join(writer.write("", tokens=50, temperature=0)) == "héy!"
    assert list(writer.write("h", tokens=50, temperature=0)) == ["é", "y", "!"]
    assert "".join(writer.write("", tokens=3, temperature=0)) == "hé"
    assert "".join(writer.write("", tokens=2, temperature=0)) == "h\ufffd"
    with pytest.raises(UserError, match="top_k of at least 1"):
        list(writer.write("", tokens=2, top_k=0))
    with pytest.raises(UserError, match="temperature of at least 0"):
        list(writer.write("", tokens=2, temperature=float("nan")))
    with pytest.raises(DataError, match=r"'a.udcff' is no text in UTF-8"):
        list(writer.write("a\udcff", tokens=2))


def test_a_context_that_a_file_claims_takes_no_memory_before_it_is_filled(tmp_path: Path) -> None:
    writer = TextWriter.of_run(saved(tmp_path, BYTES | {"context": 10**15}))
    assert len("".join(writer.write("a", tokens=30, seed=1)))


def test_a_model_with_fewer_tokens_than_its_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the tokenizer has tokens that the model does not know"):
        list(TextWriter.of_run(saved(tmp_path, BYTES | {"vocabulary": 98})).write("abc", tokens=3))


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_writes_texts_that_follow_from_their_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path).path
    texts = []
    for seed in (3, 4):
        given = ("--prompt", "ab", "--tokens", 9, "--temperature", 0.7, "--top-k", 50, "--seed", seed, "--json")
        assert command(monkeypatch, "mine", *given) == 0
        texts += json.loads(capsys.readouterr().out)
    given = ("--prompt", "ab", "--tokens", 9, "--temperature", 0.7, "--top-k", 50, "--seed", 3, "--samples", 2)
    assert command(monkeypatch, Path(path) / "checkpoint_00000007/model.safetensors", *given, "--json") == 0
    assert json.loads(capsys.readouterr().out) == texts
    assert [text["prompt"] for text in texts] == ["ab", "ab"]
    assert texts[0]["text"] != texts[1]["text"]


def test_what_a_model_writes_does_not_command_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path)
    monkeypatch.setattr(TextWriter, "of_run", lambda *_, **__: writer_of("\x1b]0;é[red\n"))
    assert command(monkeypatch, "mine", "--storage", tmp_path / "runs", "--prompt", "", "--temperature", 0) == 0
    assert capsys.readouterr().out == "\\x1b]0;é[red\n\n"
    given = ("mine", "--storage", tmp_path / "runs", "--temperature", 0, "--samples", 2, "--tokens", 3)
    assert command(monkeypatch, *given) == 0
    assert capsys.readouterr().out == "-- 1 of 2\n\\x1b]0\n-- 2 of 2\n\\x1b]0\n"


def test_the_tokenizer_is_that_of_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    byte_level().save(str(tmp_path / "mine.json"))
    content = (tmp_path / "mine.json").read_bytes()
    data = {"name": "text", "root": str(tmp_path), "train": "*.txt", "tokenizer": "mine.json"}
    folder = saved(tmp_path, facts_of(tmp_path / "mine.json"), data)
    written = list(TextWriter.of_run(folder).write("ab", tokens=5))
    assert "".join(written)
    moved = (tmp_path / "mine.json").rename(tmp_path / "moved.json")
    given = (folder.path, "--prompt", "ab", "--tokens", 5, "--json")
    assert command(monkeypatch, *given) == 2
    said = capsys.readouterr().err
    assert said.startswith("the model's tokenizer, 'mine.json', is not with the data: ")
    assert said.endswith("(--tokenizer)\n")
    assert command(monkeypatch, *given, "--tokenizer", moved) == 0
    assert json.loads(capsys.readouterr().out) == [{"prompt": "ab", "text": "".join(written)}]
    moved.write_bytes(content + b"\n")
    assert command(monkeypatch, *given, "--tokenizer", moved) == 2
    assert f"{moved}: is another tokenizer than that of the data" in capsys.readouterr().err
    weights = Path(folder.path) / "checkpoint_00000007/model.safetensors"
    assert command(monkeypatch, weights) == 2
    assert capsys.readouterr().err == (
        "the model's tokenizer, 'mine.json', is in a file of its own; give that (--tokenizer)\n"
    )


def test_the_tokenizer_beside_tokens_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    byte_level().save(str(tmp_path / "t.json"))
    Path("a.txt").write_text("some words\n", encoding="utf-8")
    monkeypatch.setattr(
        sys, "argv", ["raytorch", "data", "tokenize", "a.txt", "--tokenizer", "t.json", "--out", "books"]
    )
    with pytest.raises(SystemExit):
        main()
    folder = saved(tmp_path, facts_of(Path("t.json")), {"name": "tokens", "root": str(tmp_path / "books"), "test": 0.1})
    assert "".join(TextWriter.of_run(folder).write("words", tokens=5))


def test_a_model_of_ones_own_writes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("abcabcabc\n" * 20, encoding="utf-8")
    (tmp_path / "lm.py").write_text(
        "from torch import nn\n\n\nclass Lm(nn.Sequential):\n"
        "    def __init__(self, vocabulary: int, *, width: int = 16):\n"
        "        super().__init__(nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary))\n",
        encoding="utf-8",
    )
    data = {"name": "text", "root": str(tmp_path), "train": "a.txt", "context": 8}
    with without_ray(tmp_path, monkeypatch):
        folder = train("own", {"name": "lm.py:Lm"}, data=data, batch_size=2, optimizer={"name": "adamw", "lr": 0.1})
        written = TextWriter.of_run(folder, code=Path()).write("a", tokens=20, temperature=0)
        assert "".join(written) == ("bca" * 7)[:20]


@pytest.mark.parametrize("facts", [{"vocabulary": 9, "context": 4}, BYTES | {"end_token": None}])
def test_a_model_that_is_not_of_tokens_is_refused(tmp_path: Path, facts: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="the model is not one of tokens: its data had no facts tokenizer and end_tok"):
        TextWriter.of_run(saved(tmp_path, facts))
