"""The sources tokens and text: windows as plain slicing has them, their splits, and where text is kept as tokens."""

import math
import os
import pickle
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import torch
from lone_runs import final, train, without_ray
from tokenizers import Tokenizer, models
from torch import Tensor
from whole_runs import assert_bitwise_equal

from raytorch.config import RunConfig, TextData, TokensData
from raytorch.config.file import from_data
from raytorch.datasets import TrainLoader, load_splits
from raytorch.datasets.requests import Request, Split
from raytorch.errors import ConfigError, DataError
from raytorch.runs.plan import placed
from raytorch.sources import open_source, text, windows
from raytorch.sources.token_files import HEADER_BYTES, TokenWriter
from raytorch.sources.tokenizer import ByteTokenizer

CPU = torch.device("cpu")
END, IGNORED = 256, -100
LENGTHS = [5, 1, 9, 4, 300, 3, 8, 2]
Batch = tuple[Tensor, Tensor]
MODEL = """
from torch import nn

class Model(nn.Sequential):
    def __init__(self, vocabulary: int, *, width: int = 8):
        super().__init__(nn.Embedding(vocabulary, width), nn.Dropout(0.1), nn.Linear(width, vocabulary))
"""


def write(path: Path, lengths: list[int], seed: int = 0) -> list[list[int]]:
    """A file of random documents of so many bytes, which are returned."""
    generator = np.random.default_rng(seed)
    documents = [generator.integers(0, 256, length) for length in lengths]
    path.parent.mkdir(exist_ok=True)
    with TokenWriter(path, ByteTokenizer()) as writer:
        for document in documents:
            writer.add(document, len(document))
            writer.end_document()
    return [document.tolist() for document in documents]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number, name in enumerate(("train", "validation", "test")):
        write(tmp_path / f"{name}.tokens", LENGTHS[number:], seed=number)
    return tmp_path


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def config(run: dict[str, Any] | None = None, **data: Any) -> RunConfig:
    (Path("model.py")).write_text(MODEL, encoding="utf-8")
    return from_data(
        {"epochs": 1, "data": {"name": "tokens", "context": 4, **data}, "model": "model.py:Model", **(run or {})}
    )


def tokens_data(root: Path, split: str = "train", **keys: Any) -> Any:
    return open_source(TokensData(root=str(root), **{"context": 4, **keys}), split, training=True)


def read(split: Split) -> Batch:
    [batch] = split.read([Request(torch.arange(len(split)), 0, epoch=0)])
    return batch  # type: ignore[no-any-return]


def targets_of(batches: list[Batch]) -> Counter[int]:
    return Counter(number for _, target in batches for number in target.flatten().tolist() if number != IGNORED)


def sliced(stream: list[int], context: int) -> list[tuple[list[int], list[int]]]:
    """The windows of a stream by slicing, padded."""
    pairs = []
    for start in range(0, len(stream) - 1, context):
        target = stream[start + 1 : start + context + 1]
        missing = context - len(target)
        padded = stream[start : start + len(target) + 1] + [END] * context
        pairs.append((padded[:context], target + [IGNORED] * missing))
    return pairs


@pytest.mark.parametrize("context", [1, 3, 4, 7, 400])
@pytest.mark.parametrize("documents", ["packed", "apart"])
def test_windows_are_what_slicing_gives(
    tmp_path: Path, documents: Any, context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "_STRETCH", 3)
    monkeypatch.setattr(windows, "_AT_ONCE", 6)
    files = [
        write(tmp_path / "train" / f"{name}.tokens", LENGTHS[:count], count) for name, count in (("a", 8), ("b", 3))
    ]
    expected = []
    for file in files:
        streams = [[END, *document, END] for document in file]
        if documents == "packed":
            streams = [[END, *(token for stream in streams for token in stream[1:])]]
        expected += [window for stream in streams for window in sliced(stream, context)]
    data = tokens_data(tmp_path, train="train", context=context, documents=documents)
    assert len(data) == len(expected)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    inputs, targets = data.batch(order)
    assert (inputs.dtype, targets.dtype, inputs.is_contiguous(), targets.is_contiguous()) == (*[torch.int64] * 2, 1, 1)
    assert inputs.tolist() == [expected[number][0] for number in order]
    assert targets.tolist() == [expected[number][1] for number in order]
    assert int(data.blocks.sum()) == len(data)


@pytest.mark.parametrize("readers", [0, 2])
@pytest.mark.parametrize("documents", ["packed", "apart"])
def test_every_token_is_a_target_once_in_each_epoch(root: Path, documents: str, readers: int) -> None:
    splits = load_splits(config(root=str(root), documents=documents, readers=readers), CPU)
    stream = write(root / "again.tokens", LENGTHS)
    loader = TrainLoader(splits.train, batch_size=7)
    for _ in range(2):
        seen = targets_of([batch.content for [batch] in loader.remaining()])
        assert seen == Counter(token for document in stream for token in [*document, END])
        loader.next_epoch()


def test_blocks_are_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "_BLOCK_BYTES", 64)
    write(tmp_path / "train.tokens", LENGTHS)
    write(tmp_path / "test.tokens", [1])
    splits = load_splits(config({"shuffle": "blocks"}, root=str(tmp_path)), CPU)
    windows_of_64_bytes = 64 / 2 / 4
    sizes = splits.train.blocks  # type: ignore[attr-defined]
    assert (int(sizes.sum()), len(sizes)) == (len(splits.train), math.ceil(len(splits.train) / windows_of_64_bytes))
    parts = load_splits(config({"shuffle": "blocks"}, root=str(tmp_path), test=0.3), CPU)
    for part in (parts.train, parts.judged):
        assert int(part.blocks.sum()) == len(part)  # type: ignore[attr-defined]
    loader = TrainLoader(parts.train, batch_size=7, blocks=parts.train.blocks)  # type: ignore[attr-defined]
    assert targets_of([batch.content for [batch] in loader.remaining()]) == targets_of([read(parts.train)])


def test_the_splits_are_the_files_that_tokenize_writes(root: Path) -> None:
    splits = load_splits(config({"validation": {"split": "validation"}}, root=str(root)), CPU)
    assert splits.test is not None
    for split, name in ((splits.train, "train"), (splits.judged, "validation"), (splits.test, "test")):
        inputs, targets = tokens_data(root, name).batch(torch.arange(len(split)))
        assert torch.equal(read(split)[0], inputs)
        assert torch.equal(read(split)[1], targets)


def test_a_share_is_the_end_of_the_tokens_and_no_target_is_in_two(root: Path) -> None:
    splits = load_splits(config({"validation": {"share": 0.25}}, root=str(root), test=0.2), CPU)
    assert splits.test is not None
    whole = tokens_data(root).batch(torch.arange(10**6)[: len(tokens_data(root))])
    parts = [read(split) for split in (splits.train, splits.judged, splits.test)]
    assert [len(part[0]) for part in parts] == [51, 17, 17]
    assert torch.equal(torch.cat([part[1] for part in parts]), whole[1])


def test_facts_are_what_a_model_needs(root: Path) -> None:
    assert tokens_data(root).facts == {
        "vocabulary": 257,
        "context": 4,
        "end_token": END,
        "tokenizer": "bytes",
        "tokenizer_sha256": ByteTokenizer.sha256,
        "bytes_per_token": sum(LENGTHS) / (sum(LENGTHS) + len(LENGTHS)),
        "padding_share": round(1 - (sum(LENGTHS) + len(LENGTHS)) / (len(tokens_data(root)) * 4), 4),
    }
    assert tokens_data(root).decode([104, 105, END, 33]) == "hi!"


def test_much_padding_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "train.tokens", [3] * 20)
    tokens_data(tmp_path, documents="packed", context=64)
    tokens_data(tmp_path, documents="apart", context=8)
    assert not caplog.messages
    for _ in range(2):
        assert tokens_data(tmp_path, documents="apart", context=64).facts["padding_share"] == 1 - 4 / 64
    assert caplog.messages == [
        f"data: {tmp_path}/train.tokens: 94 % of what is read of it and the files beside it is padding, as what a "
        "window may hold is shorter than its 64 tokens; take documents: packed, or set data.context to less"
    ]


def test_it_goes_to_another_process_without_the_files(root: Path) -> None:
    data = tokens_data(root, documents="apart")
    before = data.batch(torch.arange(9))
    sent = pickle.dumps(data)
    assert len(sent) < 2_000
    assert all(
        torch.equal(one, other) for one, other in zip(pickle.loads(sent).batch(torch.arange(9)), before, strict=True)
    )


def test_files_of_another_tokenizer_are_refused(root: Path) -> None:
    class Other(ByteTokenizer):
        name, sha256 = "other\n", "ab" * 32

    with TokenWriter(root / "test.tokens", Other()) as writer:
        writer.add(np.zeros(3), 3)
        writer.end_document()
    with pytest.raises(DataError) as caught:
        load_splits(config(root=str(root)), CPU)
    assert str(caught.value) == (
        f"{root}/test.tokens: its tokens are those of other\\n (257 tokens, SHA-256 abababababab), and those of "
        f"{root}/train.tokens of bytes (257 tokens, SHA-256 {ByteTokenizer.sha256[:12]}); write all files of a "
        "data set with one tokenizer"
    )
    with pytest.raises(DataError, match=r"/test.tokens: its tokens are those of other"):
        tokens_data(root, train=["train.tokens", "test.tokens"])


@pytest.mark.parametrize("documents", ["packed", "apart"])
def test_a_token_out_of_range_is_named_with_its_place(root: Path, documents: Any) -> None:
    path = root / "train.tokens"
    content = bytearray(path.read_bytes())
    content[HEADER_BYTES + 2 * 8 : HEADER_BYTES + 2 * 9] = (999).to_bytes(2, "little")
    path.write_bytes(content)
    data = tokens_data(root, documents=documents, context=2)
    with pytest.raises(DataError) as caught:
        data.batch(torch.arange(len(data)))
    assert str(caught.value) == (
        f"{path}: token 8, of document 2, is 999, and the vocabulary has 257; write the file anew"
    )
    data.batch(torch.tensor([0]))


@pytest.mark.parametrize("ends", [[1, 2], [0, 10**9], [0, -5], [3, 2]])
def test_ends_of_documents_that_cannot_be_are_refused(tmp_path: Path, ends: list[int]) -> None:
    write(tmp_path / "train.tokens", [3])
    content = (tmp_path / "train.tokens").read_bytes()
    (tmp_path / "train.tokens").write_bytes(content[:-16] + np.array(ends).tobytes())
    assert len(tokens_data(tmp_path)) == 1
    with pytest.raises(DataError, match=r"/train.tokens: where its documents end is damaged; write the file anew$"):
        tokens_data(tmp_path, documents="apart")


@pytest.mark.parametrize("documents", ["packed", "apart"])
def test_a_run_that_is_resumed_in_the_middle_of_an_epoch_is_the_same(
    root: Path, documents: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config()
    run = {"data": {"name": "tokens", "root": str(root), "context": 4, "documents": documents}, "schedule": "constant"}
    run |= {"epochs": None, "batch_size": 16, "optimizer": {"name": "adamw", "lr": 0.01}}
    with without_ray(root, monkeypatch):
        whole, parted = (
            [final(train(name, {"name": "model.py:Model"}, steps=steps, **run)) for steps in parts][-1]
            for name, parts in (("whole", [14]), ("parted", [8, 14]))
        )
    assert_bitwise_equal(parted, whole)


# -- text --------------------------------------------------------------------------------------------------------------


def text_data(root: Path, split: str = "train", **keys: Any) -> Any:
    return open_source(TextData(root=str(root), **{"context": 16, **keys}), split, training=True)


def cached(root: Path) -> list[Path]:
    return sorted((root / "cache/raytorch/tokens").glob("*.tokens"))


def test_the_default_is_the_text_that_python_carries_and_its_end_is_the_test(tmp_path: Path) -> None:
    splits = load_splits(config(name="text"), CPU)
    assert splits.test is None
    stream = [token for _, topic in sorted(topics.items()) for token in (*topic.encode(), END)]
    parts = [read(split)[1].flatten() for split in (splits.train, splits.judged)]
    assert [len(part) for part in parts] == [
        sum(map(len, parts)) - len(parts[1]),
        4 * round(0.1 * math.ceil(len(stream) / 4)),
    ]
    assert torch.cat(parts)[: len(stream)].tolist() == stream
    assert len(cached(tmp_path)) == 1


def test_it_needs_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYTORCH_STORAGE_BASE", "/shared")  # as in a job, whose folder has no data
    data = placed(config(name="text"), "run", "/runs").data
    assert isinstance(data, TextData)
    assert data.root == "data"


def test_text_is_the_tokens_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train/a.txt").write_text("one\n\ntwö", encoding="utf-8")
    (tmp_path / "train/b.jsonl").write_text('{"content": "three"}\n', encoding="utf-8")
    data = text_data(tmp_path, train="train", documents="apart", document_per="paragraph", key="content")
    assert data.batch(torch.arange(3))[1].tolist() == [
        [*word.encode(), END, *[IGNORED] * (15 - len(word.encode()))] for word in ("one", "twö", "three")
    ]
    assert data.decode(data.batch(torch.tensor([1]))[0][0].tolist()) == "twö"
    assert data.describe(data.batch(torch.tensor([1]))) == [{"text": "twö"}]


def test_files_of_another_project_are_other_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for project in ("one", "two"):
        folder = tmp_path / project / "data"
        folder.mkdir(parents=True)
        (folder / "a.txt").write_text(f"the {project}", encoding="utf-8")
        os.utime(folder / "a.txt", (1, 1))
        monkeypatch.chdir(folder.parent)
        data = text_data(Path("data"), train="a.txt", tokens_folder=str(tmp_path / "cache"))
        assert data.decode(data.batch(torch.tensor([0]))[0][0].tolist()) == f"the {project}"


def test_other_files_rules_and_tokenizers_are_other_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words", encoding="utf-8")
    made = Tokenizer(models.WordLevel({"some words": 0, "?": 1}, unk_token="?"))
    made.save(str(tmp_path / "tokenizer.json"))
    for keys in ({}, {}, {"documents": "apart"}, {"document_per": "line"}, {"tokenizer": "tokenizer.json"}):
        data = text_data(tmp_path, train="a.txt", **keys)
    assert len(cached(tmp_path)) == 3
    assert data.facts["vocabulary"] == 3
    assert data.decode([0, 2]) == "some words"
    (tmp_path / "a.txt").write_text("some verbs", encoding="utf-8")
    text_data(tmp_path, train="a.txt")
    assert len(cached(tmp_path)) == 4


def test_of_several_workers_one_writes_the_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    all_here, wrote = threading.Barrier(3), []
    locked, write_tokens = text.locked, text.write_tokens

    def waiting(path: Path) -> Any:
        all_here.wait(60)  # each has seen that there are none
        return locked(path)

    def writing(*arguments: Any) -> None:
        wrote.append(arguments)
        write_tokens(*arguments)

    monkeypatch.setattr(text, "locked", waiting)
    monkeypatch.setattr(text, "write_tokens", writing)
    with ThreadPoolExecutor(3) as pool:
        sizes = list(pool.map(lambda _: len(text_data(tmp_path)), range(3)))
    assert (len(wrote), len(set(sizes)), len(cached(tmp_path))) == (1, 1, 1)


def test_tokens_that_were_not_completed_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(text, "write_tokens", failing)
        with pytest.raises(KeyboardInterrupt):
            text_data(tmp_path)
    assert cached(tmp_path) == []
    assert len(text_data(tmp_path)) > 10_000


def test_a_folder_that_cannot_hold_the_tokens_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        DataError, match=r"/file/cache: cannot hold the tokens: .*; name another folder as data.tokens_folder$"
    ):
        text_data(tmp_path, tokens_folder=str(tmp_path / "file/cache"))


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"tokens_folder": "here"}, "data.tokens_folder: must be a path in full"),
        ({"documents": "alone"}, "data.documents: must be one of packed, apart, not 'alone'"),
        ({"context": 0}, "data.context: must be "),
        (
            {},
            "model mlp reads images or rows, data text has tokens; take data digits or mnist or cifar10 or arrays or "
            "images or shards or table, or model gpt",
        ),
    ],
)
def test_keys_that_cannot_be_are_refused(data: Any, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config({} if data else {"model": "mlp"}, name="text", **data)
    assert told in str(caught.value)
