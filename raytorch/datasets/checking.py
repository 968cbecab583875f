"""Whether all of a run's data can be read, found out before anything is trained."""

import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raytorch.config import ImageData, RunConfig
from raytorch.datasets.loader import evaluation_batches
from raytorch.datasets.own import is_stream
from raytorch.datasets.requests import Split
from raytorch.datasets.sampling import labels_of
from raytorch.datasets.skipping import Skipped, SkippedSamples, error_line
from raytorch.datasets.splits import Splits, load_splits
from raytorch.errors import DataError, RaytorchError, UserError

MOST_LISTED = 1_000
"""Samples that cannot be read, behind which a split is read no further."""
MOST_CLASSES = 1_000
"""Classes that are counted."""
Watch = Callable[[str, int, int], None]
"""Called with the name of a split, and how many of its samples have been read, of how many."""


class Checked(NamedTuple):
    """What was found of a split."""

    name: str
    samples: int
    facts: dict[str, Any]
    batch: list[str]
    """The types and shapes of what a batch is made of."""
    classes: dict[str, int]
    """Samples of each class; empty where there are none, or too many."""
    unreadable: list[Skipped]
    problem: str
    """What is wrong beside single samples; empty if nothing is."""


class OpenedSplits(NamedTuple):
    """The splits of a run, to be looked at in this process."""

    splits: Splits
    named: dict[str, Split]


def check_splits(config: RunConfig, watch: Watch = lambda name, done, samples: None) -> Iterator[Checked]:
    """Read all samples of each split of a run, in its own order and by the readers of the configuration.

    Raises UserError where the splits cannot be opened.

    Example:
        >>> [(checked.name, checked.samples) for checked in check_splits(RunConfig(epochs=1))]
        [('train', 1500), ('test', 297)]
    """
    skipped = SkippedSamples()
    if not isinstance(config.data, ImageData):
        going_on = config.data.model_copy(update={"on_error": "skip", "max_skipped": MOST_LISTED})
        config = config.model_copy(update={"data": going_on})
    for name, split in opened_splits(config, skipped).named.items():
        skipped.known.clear()
        batch, problem = _read_all(config, name, split, watch)
        unreadable = list(skipped.known.values())
        if len(unreadable) > MOST_LISTED:
            problem = f"more than {MOST_LISTED:,} samples cannot be read; it was read no further"
        elif len(unreadable) == len(split):
            problem = ""  # than that none is left, of which each is listed
        yield Checked(name, len(split), split.facts, batch, _classes(split), unreadable, problem)


def opened_splits(config: RunConfig, skipped: SkippedSamples | None = None) -> OpenedSplits:
    """The splits of a run by their names. Raises UserError where they cannot be opened, or a loop has its own."""
    if config.loop:
        raise UserError(f"{config.loop.name} reads what it likes to; data is looked at where a configuration names it")
    try:
        splits = load_splits(config, torch.device("cpu"), partial(_refuse_stream, config), skipped)
    except RaytorchError:
        raise
    except Exception as error:
        raise DataError(f"data.name: {told(error, config)}") from error
    named = {"train": splits.train, config.judged_split: splits.judged}
    return OpenedSplits(splits, named | ({"test": splits.test} if splits.test else {}))


def _refuse_stream(config: RunConfig, data: Any) -> None:
    """Raises UserError for what is read by tasks of Ray Data's, in place of this process."""
    if is_stream(data):
        raise UserError(
            f"data.name: {config.data.name} returns a ray.data.Dataset, which tasks of Ray Data read when a run is "
            "trained, and no other command; look at it in Python, by its own show(16), schema() and count()"
        )


def told(error: Exception, config: RunConfig) -> str:
    """An error in a line; that of own code with its file and line."""
    line = error_line(error)
    root = f"{config.code.root}/" if config.code else None
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if root and frame.filename.startswith(root)]
    return f"{Path(own[-1].filename).relative_to(str(root))}:{own[-1].lineno}: {line}" if own else line


def parts(content: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """What a batch is made of, by the keys and places that lead there: tensors, and whatever else there is."""
    if isinstance(content, Mapping):
        pairs = [(str(key), value) for key, value in content.items()]
    elif isinstance(content, tuple) and hasattr(content, "_fields"):
        pairs = list(zip(content._fields, content, strict=True))
    elif isinstance(content, list | tuple) and any(
        isinstance(each, Tensor | Mapping | list | tuple) for each in content
    ):
        pairs = [(f"[{place}]", value) for place, value in enumerate(content)]
    else:
        yield name or "batch", content
        return
    for key, value in pairs:
        yield from parts(value, f"{name}{'' if key.startswith('[') or not name else '.'}{key}")


def _read_all(config: RunConfig, name: str, split: Split, watch: Watch) -> tuple[list[str], str]:
    """What a batch is made of, and what ended the reading before the end of the split."""
    batch: list[str] = []
    done = 0
    try:
        for part in evaluation_batches(split, batch_size=config.batch_size):
            batch = batch or [f"{key}: {kind_of(value)}" for key, value in parts(part.content)]
            done += part.samples
            watch(name, done, len(split))
    except Exception as error:
        return batch, told(error, config)
    return batch, ""


def kind_of(value: Any) -> str:
    """The type of a value, and the shape of a tensor."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def class_names(split: Split) -> Mapping[int, str]:
    """The names of classes by their numbers, where the facts have them as ``classes``."""
    names = split.facts.get("classes")
    return dict(enumerate(map(str, names))) if isinstance(names, list | tuple) else {}


def _classes(split: Split) -> dict[str, int]:
    labels = labels_of(split)
    if labels is None:
        return {}
    numbers, counts = torch.unique(labels.numbers[labels.are_known], return_counts=True)
    names = class_names(split)
    counted = zip(numbers.tolist(), counts.tolist(), strict=True)
    return {names.get(number, str(number)): count for number, count in counted} if len(numbers) <= MOST_CLASSES else {}
