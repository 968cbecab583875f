"""Samples that are drawn: by class or weight, the same for any number of ranks, and again after a restart."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loaders import assert_same_steps, epoch, numbered, ranks, samples, saved
from lone_runs import final
from stored_runs import project_with_store, train
from torch import Tensor
from whole_runs import assert_bitwise_equal

from raytorch.config import RunConfig, Validation
from raytorch.config.file import from_data
from raytorch.config.resuming import refused_changes
from raytorch.datasets import Dataset, TrainLoader, load_splits
from raytorch.datasets.in_memory import Moments
from raytorch.datasets.own import OwnDataset
from raytorch.datasets.sampling import drawing_weights, labels_of
from raytorch.datasets.shares import Share
from raytorch.datasets.splits import Part
from raytorch.errors import ConfigError

CPU = torch.device("cpu")
COUNT = 53
WEIGHTS = torch.arange(COUNT, dtype=torch.float64).fmod(4)  # of which every fourth is 0


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with an object store; no Ray."""
    with project_with_store(tmp_path, monkeypatch) as folder:
        yield folder


def drawn(weights: Tensor, epochs: int) -> Tensor:
    """How often each sample is drawn in so many epochs."""
    loader = TrainLoader(numbered(len(weights)), batch_size=len(weights), seed=3, weights=weights)
    counts = torch.zeros(len(weights), dtype=torch.int64)
    for _ in range(epochs):
        [batch] = next(loader.remaining())
        counts += torch.bincount(batch.content[1], minlength=len(weights))
        loader.next_epoch()
    return counts


def test_samples_are_drawn_in_proportion_to_their_weights() -> None:
    counts = drawn(WEIGHTS, 2000)
    total = counts.sum().item()
    assert total == 2000 * COUNT
    for count, weight in zip(counts.tolist(), (WEIGHTS / WEIGHTS.sum()).tolist(), strict=True):
        assert abs(count - total * weight) <= 5 * math.sqrt(total * weight)


def test_a_weight_of_all_draws_one_sample_alone() -> None:
    alone = torch.zeros(COUNT, dtype=torch.float64)
    alone[17] = 1e-300
    assert drawn(alone, 3)[17] == 3 * COUNT


def labelled(labels: list[int]) -> Dataset:
    return Dataset(torch.zeros(len(labels), 1, 2, 2, dtype=torch.uint8), torch.tensor(labels), Moments((0.5,), (1.0,)))


def test_classes_are_equally_likely() -> None:
    labels = [0] * 90 + [3] * 9 + [7]
    weights = drawing_weights("balanced", labelled(labels))
    assert weights is not None
    by_class = [float(weights[torch.tensor(labels) == label].sum()) for label in (0, 3, 7)]
    assert by_class == pytest.approx([1, 1, 1])
    counts = drawn(weights, 300)
    shares = [counts[torch.tensor(labels) == label].sum().item() / 30_000 for label in (0, 3, 7)]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.015)
    assert drawing_weights("each", labelled(labels)) is None


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_draws_are_the_same_for_any_number_of_ranks_and_new_in_each_epoch(micro_batches: int, world_size: int) -> None:
    options: dict[str, Any] = {"batch_size": 10, "weights": WEIGHTS, "seed": 5}
    alone, together = ranks(numbered(COUNT), 1, **options), ranks(numbered(COUNT), world_size, **options)
    orders = []
    for _ in range(2):
        expected, steps = epoch(alone), epoch(together)
        assert_same_steps(steps, expected)
        orders.append([sample for step in steps for sample in samples(step)])
        assert [len(samples(step)) for step in steps] == [10] * 5 + [3]
        for loader in (*alone, *together):
            loader.next_epoch()
    assert orders[0] != orders[1]
    assert len(set(orders[0])) < COUNT
    assert not set(orders[0]) & set(range(0, COUNT, 4))  # of weight 0


@pytest.mark.parametrize("world_size", [1, 2])
def test_it_resumes_at_the_exact_next_batch(world_size: int) -> None:
    options: dict[str, Any] = {"batch_size": 10, "weights": WEIGHTS, "seed": 5}
    whole = epoch(ranks(numbered(COUNT), 1, **options))
    first = TrainLoader(numbered(COUNT), **options)
    steps = first.remaining()
    next(steps)
    next(steps)
    state = saved(first)
    loaders = ranks(numbered(COUNT), world_size, **options)
    for loader in loaders:
        loader.load_state_dict(state)
    assert_same_steps(epoch(loaders), whole[2:])


# -- what a data set says ----------------------------------------------------------------------------------------------


def own(**told: Any) -> OwnDataset:
    members = {"__len__": lambda self: 4, "__getitem__": lambda self, index: index, **told}
    return OwnDataset(type("Own", (), members)(), CPU)


@pytest.mark.parametrize("labels", [[5, 5, -1, 5], torch.tensor([1, 1, 0, 1]), np.array([2, 2, 9, 2], dtype=np.uint8)])
def test_an_own_data_set_has_labels_or_weights(labels: Any) -> None:
    weights = drawing_weights("balanced", own(labels=labels))
    assert weights is not None
    assert weights.tolist() == [1 / 3, 1 / 3, 1, 1 / 3]
    weights = drawing_weights("weighted", own(weights=property(lambda self: [0, 0.5, 2, 1])))
    assert weights is not None
    assert (weights.dtype, weights.tolist()) == (torch.float64, [0, 0.5, 2, 1])


def test_a_sample_whose_class_is_not_known_is_never_drawn() -> None:
    masked = np.ma.MaskedArray([5, 5, 7, 5], [True, False, False, False])
    whole = own(labels=masked)
    weights = drawing_weights("balanced", whole)
    assert weights is not None
    assert weights.tolist() == [0, 1 / 2, 1, 1 / 2]
    for is_held_out in (True, False):
        share = Share(4, 2, np.random.SeedSequence(1), is_held_out=is_held_out)
        labels = labels_of(Part(whole, share))
        assert labels is not None
        samples = share.at(torch.arange(2)).tolist()
        assert labels.are_known.tolist() == [index != 0 for index in samples]
        assert labels.numbers.tolist() == [[5, 5, 7, 5][index] for index in samples]
    with pytest.raises(ConfigError, match="let the data set have them"):
        drawing_weights("balanced", own(labels=np.ma.MaskedArray([1, 1, 1, 1], True)))


LABELS = "sampling: balanced draws by labels, a whole number for each of its training samples; let the data set have "
NUMBERS = "sampling: weighted draws by weights, a finite number of at least 0, and not 0 of all, for each of its tr"


@pytest.mark.parametrize(
    ("sampling", "told", "message"),
    [
        ("balanced", {}, LABELS),
        ("balanced", {"labels": [1, 2, 3]}, LABELS),
        ("balanced", {"labels": [1.0, 2.0, 3.0, 4.0]}, LABELS),
        ("balanced", {"labels": ["cat", "dog", "dog", "dog"]}, LABELS),
        ("balanced", {"labels": torch.zeros(4, 2, dtype=torch.int64)}, LABELS),
        ("weighted", {"labels": [1, 2, 3, 4]}, NUMBERS),
        ("weighted", {"weights": [0.0] * 4}, NUMBERS),
        ("weighted", {"weights": [1, -1, 1, -1]}, NUMBERS),
        ("weighted", {"weights": [1, 1, math.inf, math.inf]}, NUMBERS),
        ("weighted", {"weights": [1, 1, math.inf, math.nan]}, NUMBERS),
        ("weighted", {"weights": [1e308] * 4}, NUMBERS),
        ("weighted", {"weights": lambda self: 1}, NUMBERS),
    ],
)
def test_what_does_not_tell_how_to_draw_is_refused(sampling: Any, told: dict[str, Any], message: str) -> None:
    for split in (whole := own(**told), Part(whole, torch.tensor([3, 1]))):
        with pytest.raises(ConfigError) as caught:
            drawing_weights(sampling, split)
        assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("sampling", "told", "found"),
    [
        ("balanced", {}, ""),
        ("balanced", {"labels": [1, 2, 3]}, ": here they are of shape (3,) for 4 samples"),
        ("balanced", {"labels": [0.5, 2.0, 3.0, 4.0]}, ": here they are of float32, from 0.5 to 4"),
        ("balanced", {"labels": ["cat", "dog", "dog", "dog"]}, ": here they are ['cat', 'dog', 'dog', 'dog']"),
        ("weighted", {"weights": [1, -1, 1, -1]}, ": here they are of int64, from -1 to 1"),
        ("weighted", {"weights": [1j] * 4}, ": here they are of complex64"),
    ],
)
def test_what_was_found_instead_is_told(sampling: Any, told: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        drawing_weights(sampling, own(**told))
    assert str(caught.value).endswith(f"let the data set have them{found}")


def test_the_weights_are_those_of_the_samples_that_are_trained_on() -> None:
    config = RunConfig(epochs=1, sampling="balanced", validation=Validation(share=0.4))
    splits = load_splits(config, CPU)
    labels: Any = splits.train.labels  # type: ignore[attr-defined]
    assert splits.weights is not None
    assert splits.weights.shape == labels.shape == (900,)
    assert [float(splits.weights[labels == label].sum()) for label in range(10)] == pytest.approx([1] * 10)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"sampling": "weighted"},
            "sampling: data digits has no weights to draw samples by; take sampling: each or bal",
        ),
        ({"sampling": "even"}, "sampling: must be one of each, balanced, weighted, not 'even'"),
        (
            {"sampling": "balanced", "data": "mnist_strips", "model": "seq2seq"},
            "sampling: data mnist_strips has no classes to draw samples by; take sampling: each",
        ),
    ],
)
def test_mistakes_about_it(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_data({"epochs": 1, **keys})
    assert str(caught.value).removeprefix("the configuration: ").startswith(message)


def test_it_must_stay_when_a_run_is_resumed() -> None:
    before = from_data({"epochs": 1})
    assert [key for key, *_ in refused_changes(before, from_data({"epochs": 1, "sampling": "balanced"}))] == [
        "sampling"
    ]


# -- a run -------------------------------------------------------------------------------------------------------------

OWN = """
import json
import torch

class Rows:
    facts = {"input_shape": [1, 1, 2], "num_classes": 2}

    def __init__(self, split: str):
        self.split = split
        self.weights = torch.arange(300) >= 200  # the last third

    def __len__(self):
        return 300

    def batch(self, indices):
        with open(self.split, "a") as file:
            file.write(json.dumps(indices.tolist()) + "\\n")
        return torch.ones(len(indices), 2) * indices[:, None], indices % 2
"""


def test_a_run_draws_and_goes_on_with_the_same_bits(project: Path) -> None:
    (project / "rows.py").write_text(OWN, encoding="utf-8")
    changes = {"data": "rows.py:Rows", "sampling": "weighted", "epochs": 2}
    whole = train("whole", **changes)
    given = [json.loads(line) for line in Path("train").read_text(encoding="utf-8").splitlines()]
    assert all(index >= 200 for batch in given for index in batch)
    tested = [json.loads(line) for line in Path("test").read_text(encoding="utf-8").splitlines()]
    assert sorted(index for batch in tested for index in batch) == sorted([*range(300), *range(300)])
    parted = train("parted", **changes)
    parted.delete("checkpoint_00000010")
    train("parted", **changes)
    assert_bitwise_equal(final(whole), final(parted))
