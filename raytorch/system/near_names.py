"""What a mistyped name may have been meant to be."""

import difflib
from collections.abc import Iterable


def did_you_mean(word: object, names: Iterable[str]) -> str:
    """The nearest of ``names`` as the end of a message; empty if none is near.

    Example:
        >>> did_you_mean("adamm", ["adam", "sgd"])
        " (did you mean 'adam'?)"
    """
    by_case: dict[str, list[str]] = {}
    for name in names:
        by_case.setdefault(name.lower(), []).append(name)
    close = difflib.get_close_matches(str(word).lower(), by_case, n=1)
    nearest = [name for each in close for name in difflib.get_close_matches(str(word), by_case[each], n=1, cutoff=0)]
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""
