"""Text files to files of tokens: what is written, what is refused, and what a damaged file does."""

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from raytorch.cli.main import app
from raytorch.errors import DataError, UserError
from raytorch.sources import documents, token_files
from raytorch.sources.files import File, Root
from raytorch.sources.token_files import HEADER_BYTES, MAGIC, Header, TokenFile
from raytorch.sources.tokenizer import ByteTokenizer, JsonTokenizer
from raytorch.sources.tokenizing import tokenize

END = 256
LINES = ["Wörter und Zeichen", "words and signs", "", "words, words, words"]


def opened(path: Path) -> TokenFile:
    return TokenFile(Root(str(path.parent)), File(path.name, path.stat().st_size))


def documents_of(path: Path) -> list[list[int]]:
    """The tokens of each document of a file, without those at its ends."""
    file = opened(path)
    return [file.tokens[start + 1 : stop].tolist() for start, stop in zip(file.ends, file.ends[1:], strict=False)]


def run(*arguments: Any) -> None:
    app([*map(str, ("data", "tokenize", *arguments))], standalone_mode=False)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text("\n".join(LINES), encoding="utf-8")
    (folder / "b.jsonl").write_text("".join(f"{json.dumps({'text': line})}\n" for line in LINES), encoding="utf-8")
    return folder


def test_bytes_come_back_as_they_were(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(text, "--out", tmp_path / "out")
    expected = [list("\n".join(LINES).encode()), *(list(line.encode()) for line in LINES if line)]
    assert documents_of(tmp_path / "out/train.tokens") == expected
    file = opened(tmp_path / "out/train.tokens")
    assert file.tokens[file.ends].tolist() == [END] * 5
    assert ByteTokenizer().decode(file.tokens[: file.ends[1]].tolist()) == "\n".join(LINES)
    size = sum(map(len, expected))
    assert file.header.text_bytes == size
    assert capsys.readouterr().out == f"{tmp_path}/out/train.tokens: {size + 5} tokens of 4 documents, uint16\n"
    assert [path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".lock"] == ["train.tokens"]


def test_files_are_named_as_a_shell_names_them(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    for number, names in enumerate((["..", "../text/"], ["../text/*.txt", text / "b.jsonl"], [f"{tmp_path}/."])):
        run(*names, "--out", f"out{number}")
        assert len(documents_of(Path(f"out{number}/train.tokens"))) == 4


@pytest.mark.parametrize(("per", "count"), [("line", 3), ("paragraph", 2), ("file", 1)])
def test_a_document_is_what_is_asked_for(text: Path, tmp_path: Path, per: str, count: int) -> None:
    run(text / "a.txt", "--out", tmp_path / "out", "--document-per", per)
    assert len(documents_of(tmp_path / "out/train.tokens")) == count


@pytest.mark.parametrize("per", ["file", "line", "paragraph"])
def test_long_documents_are_read_in_pieces_and_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per: Any
) -> None:
    words = ["ä" * (1 + number % 7) + "\n" * (number % 5) + " \r\n" * (number % 3 == 0) for number in range(200)]
    (tmp_path / "a.txt").write_bytes("".join(words).encode())
    run(tmp_path / "a.txt", "--out", tmp_path / "whole", "--document-per", per)
    monkeypatch.setattr(documents, "PIECE", 11)
    run(tmp_path / "a.txt", "--out", tmp_path / "pieces", "--document-per", per)
    assert documents_of(tmp_path / "pieces/train.tokens") == documents_of(tmp_path / "whole/train.tokens")


def test_blanks_between_documents_are_none_however_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE", 11)
    (tmp_path / "a.txt").write_text(f"one{' ' * 40}\n{' ' * 40}\n\n{' ' * 40}\n\n  two", encoding="utf-8")
    run(tmp_path / "a.txt", "--out", tmp_path / "out", "--document-per", "paragraph")
    found = [bytes(tokens).decode().strip() for tokens in documents_of(tmp_path / "out/train.tokens")]
    assert found == ["one", "two"]


def test_a_text_without_words_and_lines_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE", 11)
    (tmp_path / "a.txt").write_text("x" * 100, encoding="utf-8")
    file = documents.TextFile(Root(str(tmp_path)), File("a.txt", 100))
    assert [len(piece) for piece, _ in file.pieces()] == [*[11] * 9, 1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no device that is full")
def test_a_disk_that_is_full_is_left_without_a_part(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> Any:
        path.touch()
        return open("/dev/full", "w+b")  # noqa: PTH123 (the writer closes it)

    monkeypatch.setattr(token_files, "_created", full)
    with pytest.raises(OSError, match="No space left on device"):
        run(text, "--out", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".tokenize.lock"]


def test_documents_are_drawn_for_each_split_by_the_seed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(map(str, range(1000))), encoding="utf-8")
    parts = {}
    for seed in (0, 1):
        run(
            *(tmp_path / "a.txt", "--out", tmp_path / f"{seed}", "--document-per", "line"),
            *("--validation", 0.01, "--test", 0.1, "--seed", seed),
        )
        names = [f"{tmp_path}/{seed}/{name}.tokens" for name in ("train", "validation", "test")]
        parts[seed] = [[int(bytes(tokens)) for tokens in documents_of(Path(name))] for name in names]
        assert [len(part) for part in parts[seed]] == [890, 10, 100]
        assert sorted(number for part in parts[seed] for number in part) == list(range(1000))
    assert parts[0][2] != parts[1][2]


def test_a_tokenizer_json_is_used_copied_and_named(text: Path, tmp_path: Path) -> None:
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel()
    made.train_from_iterator(LINES * 5, trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "</s>"]))
    made.enable_truncation(3)
    path = tmp_path / "tokenizer.json"
    made.save(str(path))
    run(text / "b.jsonl", "--out", tmp_path / "out", "--tokenizer", path)
    made.no_truncation()
    assert documents_of(tmp_path / "out/train.tokens") == [made.encode(line).ids for line in LINES if line]
    header = opened(tmp_path / "out/train.tokens").header
    assert (header.dtype, header.vocabulary, header.end_token) == ("uint8", made.get_vocab_size(), 1)
    assert (tmp_path / "out/tokenizer.json").read_bytes() == path.read_bytes()
    other = JsonTokenizer(path.read_bytes(), str(path), "<unk>")
    assert (other.end_token, other.sha256) == (0, header.tokenizer_sha256)
    with pytest.raises(DataError, match=r"/tokenizer.json: has no token '<nil>' to end documents with$"):
        JsonTokenizer(path.read_bytes(), str(path), "<nil>")


def test_a_tokenizer_that_ends_no_documents_gets_a_token_for_that(tmp_path: Path) -> None:
    made = Tokenizer(models.WordLevel({"a": 0, "b": 7}, unk_token="a"))
    tokenizer = JsonTokenizer(made.to_str().encode(), "tokenizer.json")
    assert (tokenizer.vocabulary, tokenizer.end_token) == (9, 8)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", b"fine\n\xff\n", "/a.txt, byte 5: expected text in UTF-8, found 0xff (invalid start byte); "),
        ("a.txt", b"fine \xc3", "/a.txt, byte 5: expected text in UTF-8, found 0xc3 (unexpected end of data); "),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "/a.jsonl, byte 24: expected text in UTF-8, found 0xff"),
        (
            "a.jsonl",
            b'{"text": "a"}\n\n{"txt": "b"}',
            ", line 3: expected a JSON object with a text as 'text', found 't",
        ),
        ("a.jsonl", b'{"text": 1}', "line 1: expected a JSON object with a text as 'text', found int there"),
        ("a.jsonl", b'["text"]', "line 1: expected a JSON object with a text as 'text', found list"),
        ("a.jsonl", b"{}", "line 1: expected a JSON object with a text as 'text', found an empty one"),
        ("a.jsonl", b'{"text": "a"', "line 1: expected a JSON object with a text as 'text', found what is no JSON: "),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1: expected a JSON object with a text as 'text', found half a char"),
        ("a.jsonl", b"[" * 100_000, "line 1: expected a JSON object with a text as 'text', found what is no JSON: "),
        ("a.txt", b"", "the files hold no text"),
        ("a.png", b"", ": expected .txt or .jsonl files of the data set, found none among the 1 files there"),
    ],
)
def test_what_is_no_text_is_named_and_leaves_nothing(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        run(tmp_path / "text", "--out", tmp_path / "out")
    assert told in str(caught.value)
    assert [path.name for path in (tmp_path / "out").glob("*")] in ([], [".tokenize.lock"])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--test", "0.5", "--validation", "0.5"], "--validation 0.5 and --test 0.5 leave nothing to train on"),
        (["--tokenizer", "README.md"], "README.md: "),
        (["--end-token", "x"], "the tokenizer bytes ends documents with a token of its own, and not with 'x'"),
        (["--test", "0.001"], "4 documents leave none for the split test for a share of 0.001; take another share"),
    ],
)
def test_options_that_do_not_go_are_refused(text: Path, tmp_path: Path, options: list[str], told: str) -> None:
    with pytest.raises(UserError) as caught:
        run(text, "--out", tmp_path / "out", *options)
    assert told in str(caught.value)


def test_of_two_processes_one_writes_and_what_is_there_stays(text: Path, tmp_path: Path) -> None:
    code = "from raytorch.cli.main import main; main()"
    command = [sys.executable, "-c", code, "data", "tokenize", str(text), "--out", str(tmp_path / "out")]
    started = [subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) for _ in "ab"]
    told = [process.communicate()[1] for process in started]
    assert sorted(process.returncode for process in started) == [0, 2]
    assert "".join(told) == f"{tmp_path}/out: has train.tokens; delete them, or name another folder\n"
    assert len(documents_of(tmp_path / "out/train.tokens")) == 4


def test_what_a_killed_process_left_is_in_nobodys_way(text: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.train.tokens.part").write_bytes(b"half")
    run(text, "--out", tmp_path / "out")
    assert len(documents_of(tmp_path / "out/train.tokens")) == 4
    assert not (tmp_path / "out/.train.tokens.part").exists()


def header_of(**changes: Any) -> bytes:
    numbers = {"tokens": 3, "documents": 1, "text_bytes": 1, "vocabulary": 257, "end_token": 256}
    told = {"version": 1, "dtype": "uint16", "tokenizer": "bytes", "tokenizer_sha256": "0"} | numbers | changes
    return (MAGIC + json.dumps(told).encode()).ljust(HEADER_BYTES)


REST = struct.pack("<3H2x2q", 256, 65, 256, 0, 2)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "expected a file of tokens, as raytorch data tokenize writes them, found another"),
        (MAGIC, "expected a file of tokens, as raytorch data tokenize writes them, found another"),
        (MAGIC.ljust(HEADER_BYTES) + REST, "the header is damaged"),
        (MAGIC + b"[" * (HEADER_BYTES - len(MAGIC)) + REST, "the header is damaged"),
        (header_of(version=2) + REST, "is of version 2, and this raytorch reads 1"),
        (header_of(tokens=10**15) + REST, "expected 2,000,000,000,004,112 bytes for 1,000,000,000,000,000 tokens of "),
        (header_of(tokens=2**70) + REST, "the header is damaged"),
        (header_of(tokens=-1) + REST, "the header is damaged"),
        (header_of(tokens=3.0) + REST, "the header is damaged"),
        (header_of(documents=0) + REST, "the header is damaged"),
        (header_of(documents=10**6) + REST, "the header is damaged"),
        (header_of(dtype="object") + REST, "the header is damaged"),
        (header_of(vocabulary=70_000) + REST, "the header is damaged"),
        (header_of(end_token=257) + REST, "the header is damaged"),
        (header_of() + REST[:-1], "expected 4,120 bytes for 3 tokens of 1 documents, found 4,119"),
        (header_of() + REST + b"\0", "expected 4,120 bytes for 3 tokens of 1 documents, found 4,121"),
    ],
)
def test_a_file_that_does_not_bear_out_its_header_is_refused(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "a.tokens"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        opened(path)
    assert str(caught.value).startswith(f"{path}: {told}")


def test_the_format_is_what_the_page_says(tmp_path: Path) -> None:
    (tmp_path / "a.tokens").write_bytes(header_of() + REST)
    file = opened(tmp_path / "a.tokens")
    assert (file.tokens.tolist(), file.ends.tolist()) == ([256, 65, 256], [0, 2])
    assert file.header == Header("uint16", 3, 1, 1, 257, 256, "bytes", "0")


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    import tracemalloc

    (tmp_path / "a.txt").write_bytes(b"0123456789 abcde\n" * 2_000_000)
    root = Root(str(tmp_path))
    text = documents.TextFile(root, root.find(["a.txt"])[0])
    tracemalloc.start()
    headers = tokenize([text], ByteTokenizer(), tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert headers["train"].text_bytes == 34_000_000
    assert peak < 24e6
    assert np.array_equal(opened(tmp_path / "out/train.tokens").ends, [0, 34_000_001])
