"""The generators that a data set draws from without being given one: those of random, numpy.random and torch.

They are seeded for each batch, so that what is drawn follows from the batch's own seed. Seeding takes a third of the
time of a batch that is a single look-up, and most of these draw nothing. That two of them were left alone is known by
what they give next: the same as generators beside them, seeded and drawn from in the same way, that nobody else has.
"""

import random
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch

R = TypeVar("R")
T = TypeVar("T")

_python, _numpy = random.Random(), np.random.RandomState()  # noqa: S311
_common_python, _common_numpy = random.random, np.random.random_sample
_beside_python, _beside_numpy = _python.random, _numpy.random_sample


def seed_common(seed: int) -> None:
    """Seed them, from 64 bits at most."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


class SeededReading:
    """Reads as if the generators were seeded for each batch, and leaves it where a data set draws from none of them."""

    def __init__(self) -> None:
        self._draws: bool | None = None

    def read(self, seed: int, batch: Callable[[R], T], request: R) -> T:
        """What ``batch`` returns with the generators seeded. PyTorch's, which dropout draws from, is left as it was.

        One of many that draws, when none before it has, is called a second time.
        """
        generator = torch.default_generator
        state = generator.get_state()
        try:
            if self._draws is False:
                generator.manual_seed(seed)
                try:
                    answer = batch(request)
                except Exception:
                    if _were_left_alone():
                        raise
                else:
                    if _were_left_alone():
                        return answer
                self._draws = True
            seed_common(seed)
            return batch(request) if self._draws else self._first(seed, batch, request)
        finally:
            generator.set_state(state)

    def _first(self, seed: int, batch: Callable[[R], T], request: R) -> T:
        _python.seed(seed)
        _numpy.seed(seed & 0xFFFFFFFF)
        answer = batch(request)
        self._draws = not _were_left_alone()
        return answer


def _were_left_alone() -> bool:
    """Tell whether nobody has drawn from random and numpy.random since the last time."""
    numpy_was = _common_numpy() == _beside_numpy()
    return _common_python() == _beside_python() and numpy_was
