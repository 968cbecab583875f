"""Processes that read batches ahead: what they send, what they raise, and how they end."""

import ctypes
import faulthandler
import importlib
import io
import os
import signal
import sys
import threading
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raytorch.datasets import TrainLoader
from raytorch.datasets.own import OwnDataset
from raytorch.datasets.readers import AHEAD, Readers
from raytorch.errors import ReaderDiedError
from raytorch.training import monitor

CPU = torch.device("cpu")
Pair = namedtuple("Pair", "left right")


def sent(value: Any) -> Any:
    """A value as a reader's answer arrives."""
    [arrived] = Readers(lambda request: value, 1).read([None])
    return arrived


def take_validation_away() -> None:
    """Load something: PyTorch validates sparse tensors that were unpickled at the next load, and warns of that once."""
    file = io.BytesIO()
    torch.save({}, file)
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6).view(2, 3),
        torch.arange(6.0).view(2, 3).t(),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.arange(10)[::3],
        torch.ones(3).expand(2, 3),
        torch.randn(3).bfloat16(),
        torch.tensor(2.5),
        torch.empty(0, 4),
        torch.tensor([True, False]),
        torch.randn(2, dtype=torch.complex64).conj(),
        torch.randn(3, requires_grad=True),
        torch.eye(3).to_sparse(),
    ],
    ids=lambda tensor: f"{tensor.dtype}-{list(tensor.shape)}-{tensor.layout}",  # the same in each of pytest's processes
)
def test_a_tensor_arrives_as_it_was(tensor: torch.Tensor) -> None:
    arrived = sent(tensor)
    take_validation_away()
    assert (arrived.dtype, arrived.shape, arrived.requires_grad) == (tensor.dtype, tensor.shape, tensor.requires_grad)
    assert torch.equal(arrived.to_dense(), tensor.to_dense())
    if tensor.layout is torch.strided and 1 not in tensor.shape and tensor.numel() > 3:
        assert arrived.stride() == tensor.clone().stride()


def test_what_is_no_tensor_arrives_too_and_can_be_written_to() -> None:
    shared = torch.zeros(3)
    value = {"array": np.arange(4), "text": ["a", None], "pair": Pair(shared, 2), "again": shared, "none": np.empty(0)}
    arrived = sent(value)
    assert arrived["array"].tolist() == [0, 1, 2, 3]
    assert (arrived["text"], type(arrived["pair"])) == (["a", None], Pair)
    assert arrived["again"] is arrived["pair"].left
    arrived["array"][0], arrived["again"][0] = 5, 5
    assert arrived["none"].shape == (0,)


def test_requests_and_answers_of_any_size_do_not_wait_for_each_other() -> None:
    requests = [np.full(500_000, number) for number in range(7)]
    answers = list(Readers(lambda request: [str(request[0]) * 1_000_000, request], 2).read(requests))
    assert [(text[0], int(array[-1])) for text, array in answers] == [(str(number), number) for number in range(7)]


def test_what_was_read_ahead_and_not_fetched_is_forgotten() -> None:
    readers = Readers(lambda request: (request, os.getpid()), 2)
    first = readers.read(range(100))
    begun = [next(first)]
    first.close()
    again = list(readers.read(range(200, 207)))
    assert [number for number, _ in again] == list(range(200, 207))
    assert len({pid for _, pid in [*begun, *again]}) == 2  # they are the same for all epochs


@pytest.mark.parametrize("count", [1, 2])
def test_batches_that_are_overtaken_leave_the_newer_ones_as_they_are(count: int) -> None:
    readers = Readers(lambda request: request, count)
    before = readers.read(range(100))
    assert [next(before) for _ in range(3)] == [0, 1, 2]
    newer = readers.read(range(1000, 1030))
    assert next(newer) == 1000
    with pytest.raises(RuntimeError, match=r"were asked for other batches since; read these anew"):
        next(before)
    assert list(newer) == list(range(1001, 1030))
    assert list(readers.read(range(7))) == list(range(7))


def test_batches_that_are_asked_for_meanwhile_take_the_place_of_those_before() -> None:
    readers = Readers(str.upper, 1)
    before = readers.read("abcdef")
    assert next(before) == "A"
    assert list(readers.read("xy")) == ["X", "Y"]
    with pytest.raises(RuntimeError, match=r"were asked for other batches since; read these anew"):
        next(before)


def test_no_more_is_read_ahead_than_is_said() -> None:
    asked: list[int] = []
    answers = Readers(lambda request: request, 2).read(asked.append(number) or number for number in range(100))
    next(answers)
    assert len(asked) == 2 * AHEAD
    answers.close()


def numbered(request: Any) -> Any:
    """Some more and some less, by the request."""
    return {"all": np.full(100_000 + 5_000 * (request % 11), request), "rest": torch.full((1_000,), request)}


@pytest.mark.parametrize("count", [1, 2])
def test_memory_of_batches_that_are_gone_is_taken_for_others(count: int) -> None:
    readers = Readers(numbered, count)
    places = set()
    for _ in range(2):
        for number, answer in enumerate(readers.read(range(60))):
            assert (answer["all"] == number).all()
            places.add(answer["all"].ctypes.data)
            del answer
    assert len(places) <= 6 * count  # the first are replaced by larger ones


def test_a_part_of_a_batch_keeps_what_it_is_while_others_come() -> None:
    answers = Readers(numbered, 2).read(range(200))
    keep: list[Callable[[dict[str, Any]], Any]] = [
        lambda answer: answer["all"][70_000:].reshape(-1, 10)[::3],
        lambda answer: torch.from_numpy(answer["all"]).view(-1, 10)[5],
        lambda answer: answer["rest"].view(10, 100).t(),
        lambda answer: answer["rest"].numpy()[:1],
        lambda answer: memoryview(answer["all"])[3:],
        lambda answer: answer["rest"].untyped_storage(),
    ]
    kept = [part(next(answers)) for part in keep]
    del keep
    whole = [next(answers)["rest"] for _ in range(20)]
    for number, answer in enumerate(answers, 26):
        assert answer["rest"].unique().tolist() == [number]
        del answer
    kept[5] = torch.empty(0, dtype=torch.int64).set_(kept[5])
    assert [set(np.asarray(each).ravel().tolist()) for each in kept] == [{number} for number in range(6)]
    assert [set(each.tolist()) for each in whole] == [{number} for number in range(6, 26)]


# -- failures ----------------------------------------------------------------------------------------------------------

OWN = """
import torch

class Odd(Exception):
    def __init__(self, place, reason):
        super().__init__(f"{reason} at {place}")

class Images:
    def __init__(self, kind):
        self.kind = kind

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return load(self.kind, index)

def load(kind, index):
    if kind == "exit":
        raise SystemExit(3)
    if kind == "interrupt":
        raise KeyboardInterrupt
    if kind == "shape":
        return torch.zeros(index)
    try:
        {}["label"]
    except KeyError as error:
        if kind == "odd":
            raise Odd(7, "no label")
        raise ValueError("no label") from error
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A user's file."""
    (tmp_path / "own_images.py").write_text(OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("own_images")
    del sys.modules["own_images"]


def told(data: Any, readers: int, project: Path) -> tuple[type, str, list[str]]:
    """The exception that a data set raises, and its traceback as a run tells it."""
    loader = TrainLoader(OwnDataset(data, CPU, readers=readers), batch_size=4)
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        list(loader.remaining())
    text = monitor._own_traceback(caught.value, str(project))
    lines = [line for line in text.splitlines() if line.strip(" ^~")]
    return caught.type, str(caught.value), [line for line in lines if "raytorch" not in line or "/tests/" in line]


@pytest.mark.parametrize("kind", ["value", "exit", "interrupt"])
def test_an_exception_in_a_reader_is_told_as_without_readers(own: Any, tmp_path: Path, kind: str) -> None:
    kind_of, message, lines = told(own.Images(kind), 0, tmp_path)
    assert told(own.Images(kind), 2, tmp_path) == (kind_of, message, lines)
    assert any("in load" in line for line in lines)
    assert "torch/utils" not in "".join(lines)


def test_an_exception_that_cannot_be_sent_is_told_by_its_name(own: Any, tmp_path: Path) -> None:
    kind, message, lines = told(own.Images("odd"), 1, tmp_path)
    assert (kind.__name__, message) == ("Odd", "no label at 7")
    assert lines[-2:] == ["own_images.Odd: no label at 7", "sample 0 of Images"]
    assert lines == told(own.Images("odd"), 0, tmp_path)[2]


def test_samples_that_cannot_be_put_together_are_told_where_that_was_tried(own: Any, tmp_path: Path) -> None:
    kind, message, lines = told(own.Images("shape"), 1, tmp_path)
    assert kind is RuntimeError
    assert "stack expects each tensor to be equal size" in message
    assert any("collate.py" in line for line in lines)


def test_a_batch_that_cannot_be_sent_is_told_with_what_to_do() -> None:
    with pytest.raises(TypeError, match=r"a batch cannot be sent by a reader, which pickles it: .*; or readers: 0"):
        list(Readers(lambda request: threading.Lock(), 1).read([None]))


def kill(number: int) -> Callable[[Any], Any]:
    return lambda request: os.kill(os.getpid(), number)


def crash(request: Any) -> None:
    faulthandler.disable()  # pytest's
    ctypes.string_at(0)


@pytest.mark.parametrize(
    ("deed", "message"),
    [
        (
            lambda request: os._exit(3),
            "ended with exit status 3 while it read a batch; let own code raise an exception",
        ),
        (lambda request: os._exit(0), "ended with exit status 0 while"),
        (
            kill(signal.SIGKILL),
            "died of SIGKILL while it read a batch; somebody killed it, or the machine has no memory",
        ),
        (kill(signal.SIGTERM), "died of SIGTERM while it read a batch; readers: 0 reads without it"),
        (crash, "died of SIGSEGV while it read a batch; code that is not Python's"),
    ],
)
def test_a_reader_that_dies_is_told_as_such(deed: Callable[[Any], Any], message: str) -> None:
    answers = Readers(lambda request: deed(request) if request == 2 else request, 2).read(range(9))
    assert [next(answers), next(answers)] == [0, 1]  # what had been read before
    with pytest.raises(ReaderDiedError) as caught:
        next(answers)
    assert str(caught.value).startswith(f"data.readers: reader 1 of 2 {message}")
