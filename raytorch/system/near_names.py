"""What a mistyped name may have been meant to be."""

import difflib
from collections.abc import Iterable

_NEARLY_ALIKE = 0.85


def did_you_mean(word: object, names: Iterable[str]) -> str:
    """The nearest of ``names`` as the end of a message; empty if none is near.

    Unless one is spelled nearly alike, it is one that is a whole part of the word.

    Example:
        >>> did_you_mean("adamm", ["adam", "sgd"])
        " (did you mean 'adam'?)"
        >>> did_you_mean("image_size", ["cache_size", "size"])
        " (did you mean 'size'?)"
    """
    by_case: dict[str, list[str]] = {}
    for name in names:
        by_case.setdefault(name.lower(), []).append(name)
    given = str(word).lower()
    alike = difflib.get_close_matches(given, by_case, n=1, cutoff=_NEARLY_ALIKE)
    within = sorted((name for name in by_case if f"_{name}_" in f"_{given}_"), key=len)[-1:]
    close = alike or within or difflib.get_close_matches(given, by_case, n=1)
    nearest = [name for each in close for name in difflib.get_close_matches(str(word), by_case[each], n=1, cutoff=0)]
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""
