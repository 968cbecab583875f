"""Samples that cannot be read: what tells of them, and which are read in their place."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from raytorch.datasets.requests import Request
from raytorch.datasets.sampling import number_of_each
from raytorch.errors import DataError, RaytorchError, StorageError, message_of

LONGEST_ERROR = 500
"""Characters that are kept of the error of a sample."""
_NAMED = 8
"""Samples of a batch that its error names."""


class Skipped(NamedTuple):
    """A sample that cannot be read, in whose place another is."""

    split: str
    number: int
    """Its index among the samples of the split's files, of which a share may be of another split."""
    error: str
    """In one line."""

    def __str__(self) -> str:
        return f"sample {self.number:,} of {self.split}: {self.error}"


class SkippedSamples:
    """The samples that this process has skipped, each once.

    Example:
        >>> skipped = SkippedSamples()
        >>> skipped.add([Skipped("train", 7, "no JPEG")], most=1)
        >>> skipped.add([Skipped("train", 7, "no JPEG"), Skipped("train", 9, "no JPEG")], most=1)
        Traceback (most recent call last):
        raytorch.errors.DataError: more than 1 sample cannot be read (data.max_skipped); ...
    """

    def __init__(self, tell: Callable[[list[Skipped]], int] | None = None, listed_in: str = "") -> None:
        """``tell`` hears of each once, and answers how many there are over all processes; they are ``listed_in`` a
        file.
        """
        self._tell, self._listed_in = tell, listed_in
        self.known: dict[tuple[str, int], Skipped] = {}

    def add(self, samples: Sequence[Skipped], most: int) -> None:
        """Take some more. Raises DataError if there are more than ``most``."""
        new = {each[:2]: each for each in samples if each[:2] not in self.known}
        if not new:
            return
        self.known |= new
        count = self._tell(list(new.values())) if self._tell else len(self.known)
        if count > most:
            listed = f"; all that were met are listed in {self._listed_in}" if self._listed_in else ""
            raise DataError(
                f"more than {most:,} sample{'s' if most > 1 else ''} cannot be read (data.max_skipped); the last: "
                f"{samples[-1]}{listed}"
            )


class NoneReadableError(Exception):
    """No sample is found that could be read in the place of another."""


class StandIns:
    """Finds a sample that can be read for each that cannot: the next one by its index, of the same share of the split.

    Which it is follows from the sample alone, whoever reads it, and its random numbers from the place that it takes.
    """

    def __init__(self, data: Any, most: int, *, is_random: bool = False) -> None:
        """Gives up after more than ``most`` of a batch. ``is_random`` says whether reading takes random numbers, which
        may be what it fails for.
        """
        self._data, self._most, self._is_random = data, most, is_random
        self._known: dict[int, str] = {}
        """Those that are not tried again: a shard that cannot be read would be read for each of its samples."""
        self._drawn: Any = None

    def read(self, index: int, request: Request, read: Callable[[int], Any], errors: dict[int, str]) -> tuple[int, Any]:
        """What is read of a sample of a request, or in its place, and which it is.

        Those that ``read`` fails for are put into ``errors``. Raises NoneReadableError.
        """
        first = index
        while True:
            told = self._known.get(index)
            if told is None:
                try:
                    return index, read(index)
                except (StorageError, MemoryError):  # of which the sample is not the cause
                    raise
                except Exception as error:
                    told = error_line(error)
                    if isinstance(error, DataError) or not self._is_random:
                        self._known[index] = told
            errors.setdefault(index, told)
            index = self._next(index, request)
            if index == first or len(errors) > self._most:
                raise NoneReadableError

    def _next(self, index: int, request: Request) -> int:
        """The next sample of the share, and the first one behind the last, without those of weight 0."""
        shares = request.shares
        place, end = torch.tensor([index]), len(shares[-1]) if shares else len(self._data)
        for share in shares:
            place = share.below(place)
        drawn = self._drawn_samples()
        for _ in range(end):
            place = (place + 1) % end
            sample = place
            for share in reversed(shares):
                sample = share.at(sample)
            if drawn is None or drawn[sample]:
                return int(sample)
        return index

    def _drawn_samples(self) -> Any:
        """Which samples have a weight above 0; None if it is no matter."""
        if self._drawn is None:
            weights = number_of_each(self._data, "weights")
            self._drawn = (None if weights is None or not bool((weights > 0).any()) else weights > 0,)
        return self._drawn[0]


def error_line(error: BaseException) -> str:
    """An error in one line: what raytorch's own say, of others the class as well."""
    notes = [str(note) for note in getattr(error, "__notes__", ())]
    text = " ".join(message_of(error).removesuffix("".join(f"\n{note}" for note in notes)).split())
    text += "".join(f" ({note})" for note in notes)
    kind = type(error).__name__
    told = text if isinstance(error, RaytorchError) else f"{kind}: {text}" if text else kind
    return told if len(told) <= LONGEST_ERROR else f"{told[: LONGEST_ERROR - 3]}..."


def name_samples(error: Exception, split: str, indices: Sequence[int]) -> None:
    """Add to the error of own code of which sample it is, or of one of which; raytorch's own errors say so themselves.

    Which one of a batch it is would be known by reading them again.
    """
    if isinstance(error, RaytorchError):
        return
    first = ", ".join(map(str, indices[:_NAMED]))
    several = f"one of {len(indices)} samples, {first}{', ...' if len(indices) > _NAMED else ''}, of {split}"
    error.add_note(f"sample {first} of {split}" if len(indices) == 1 else several)


def name_unlike(error: Exception, split: str, indices: Sequence[int], samples: Sequence[Any]) -> None:
    """Add to the error of what puts samples together which of them is not like the first, if one is not."""
    forms = [_form(sample) for sample in samples]
    other = next((place for place, form in enumerate(forms) if form != forms[0]), None)
    if other is None:
        name_samples(error, split, indices)
    elif not isinstance(error, RaytorchError):
        error.add_note(
            f"sample {indices[other]} of {split} is {forms[other]:.80}, and sample {indices[0]} {forms[0]:.80}; give "
            "the data set a collate(samples) that pads them, say, or let it return samples of one shape"
        )


def _form(sample: Any) -> str:
    """The shapes of the tensors and arrays of a sample, and the types of what else there is."""
    if isinstance(sample, dict):
        return f"{{{', '.join(f'{key}: {_form(value)}' for key, value in sample.items())}}}"
    if isinstance(sample, list | tuple):
        return f"({', '.join(map(_form, sample))})"
    shape = getattr(sample, "shape", None)
    return type(sample).__name__ if shape is None else str(list(shape))
