"""Random number generators of samples: those that numpy makes of a SeedSequence, made for many samples at a time.

One by one they take 10 us each, and between two samples whose own work has filled the processor's caches several times
that. What SeedSequence computes differs in its last step alone, which takes no longer for a thousand than for one.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISpawnableSeedSequence

_AT_ONCE = 1024
_BLOCKS = 4
"""So many of them are kept."""
_WORD, _MASK = 32, 2**32 - 1
_POOL = 4
_STATE = 4
"""Words of 64 bits that a PCG64 asks for."""
# Constants of numpy's SeedSequence, whose numbers numpy promises to keep.
_INIT_A, _MULT_A, _INIT_B, _MULT_B = 0x43B0D7E5, 0x931E8875, 0x8B51F9DD, 0x58F38DED
_MIX_L, _MIX_R, _SHIFT = (np.uint32(number) for number in (0xCA01F9DD, 0x4973F715, 16))


class SampleGenerators:
    """Generators by an epoch and a sample's place in it.

    Example:
        >>> sequence = np.random.SeedSequence(5, spawn_key=(2, 70))
        >>> SampleGenerators(seed=5).at(2, 70).random() == np.random.default_rng(sequence).random()
        True
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._states = lru_cache(_BLOCKS)(self._new_states)

    def at(self, epoch: int, place: int) -> np.random.Generator:
        """A new one, as of ``np.random.SeedSequence(seed, spawn_key=(epoch, place))``."""
        state = self._states(epoch, place // _AT_ONCE)[place % _AT_ONCE]
        return np.random.Generator(np.random.PCG64(_Known(state, self._seed, (epoch, place))))

    def _new_states(self, epoch: int, block: int) -> Any:
        return states(self._seed, epoch, block * _AT_ONCE, _AT_ONCE)


def states(seed: int, epoch: int, first: int, count: int) -> "np.ndarray[Any, np.dtype[np.uint64]]":
    """(``count``, 4): ``SeedSequence(seed, spawn_key=(epoch, place)).generate_state(4, np.uint64)`` by places.

    ``count`` is a power of two, and divides ``first``.
    """
    pool = [*np.random.SeedSequence(seed, spawn_key=(epoch,)).pool[:, None]]
    hashed = _POOL * (_POOL + max(0, _words(seed) - _POOL) + _words(epoch))
    factor = _INIT_A * pow(_MULT_A, hashed, 2**_WORD) & _MASK
    low = np.arange(first & _MASK, (first & _MASK) + count, dtype=np.uint32)
    for number in (low, *(np.uint32(first >> shift & _MASK) for shift in range(_WORD, _WORD * _words(first), _WORD))):
        for place, there in enumerate(pool):
            following = factor * _MULT_A & _MASK
            mixed = _MIX_L * there - _MIX_R * _hashed(number, factor, following)
            pool[place], factor = mixed ^ mixed >> _SHIFT, following
    found, factor = np.empty((count, 2 * _STATE), np.uint32), _INIT_B
    for word in range(2 * _STATE):
        following = factor * _MULT_B & _MASK
        found[:, word] = _hashed(pool[word % _POOL], factor, following)
        factor = following
    return found.view(np.uint64)


def _words(number: int) -> int:
    return max(1, -(-number.bit_length() // _WORD))


def _hashed(number: Any, factor: int, following: int) -> Any:
    number = (number ^ np.uint32(factor)) * np.uint32(following)
    return number ^ number >> _SHIFT


class _Known(ISpawnableSeedSequence):
    """A SeedSequence with a state that is known, which makes the rest when that is asked for."""

    def __init__(self, state: Any, seed: int, key: tuple[int, int]) -> None:
        self._state, self._seed, self._key = state, seed, key
        self._made: np.random.SeedSequence | None = None

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> Any:
        if n_words == _STATE and dtype is np.uint64:
            return self._state.copy()  # which is the caller's, as numpy's is
        return self._whole().generate_state(n_words, dtype)

    def spawn(self, n_children: int) -> Any:
        return self._whole().spawn(n_children)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole(), name)

    def __reduce__(self) -> Any:
        return _itself, (self._whole(),)

    def _whole(self) -> np.random.SeedSequence:
        if self._made is None:
            self._made = np.random.SeedSequence(self._seed, spawn_key=self._key)
        return self._made


def _itself(sequence: np.random.SeedSequence) -> np.random.SeedSequence:
    return sequence
