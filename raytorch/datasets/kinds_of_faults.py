"""Samples that cannot be read, by what is wrong with them: the same but for file, row and number is one thing."""

import re
from collections.abc import Iterable, Sequence

from raytorch.datasets.skipping import Skipped

_FEW = 3
"""So many of a kind are told one by one."""
_VARYING = re.compile(r"'[^']*'|\"[^\"]*\"|\d[\d,.]*")


def told_by_kind(samples: Iterable[Skipped], *, each: bool = False) -> list[str]:
    """What is to be said of samples, a line for each kind, or ``each`` of them.

    Example:
        >>> rows = [Skipped("train", row, f"a.csv: line {row + 2}: no number") for row in range(9)]
        >>> told_by_kind(rows)
        ['9 samples: a.csv: line 2: no number (also a.csv: line 3, a.csv: line 4, ...)']
    """
    kinds: dict[str, list[Skipped]] = {}
    for sample in samples:
        parts = sample.error.split(": ")
        place = 0 if len(parts) == 1 or "/" not in parts[0] else 1  # a file has names of all kinds
        kinds.setdefault(_VARYING.sub("#", ": ".join(parts[place:])), []).append(sample)
    return [line for alike in kinds.values() for line in _told(alike, each=each)]


def _told(alike: Sequence[Skipped], *, each: bool) -> list[str]:
    if each or len(alike) <= _FEW:
        return [f"sample {sample.number:,}: {sample.error}" for sample in alike]
    parts = [sample.error.split(": ") for sample in alike]
    differ = [place for place in range(min(map(len, parts))) if len({own[place] for own in parts}) > 1]
    places = [": ".join(own[: differ[-1] + 1]) if differ else "" for own in parts]
    named = list(dict.fromkeys(places))[1 : 1 + _FEW - 1]
    also = f" (also {', '.join(named)}{', ...' if len(alike) > _FEW else ''})" if any(named) else ""
    return [f"{len(alike):,} samples: {alike[0].error}{also}"]
