"""What a mistyped name may have been meant to be."""

import difflib
from collections.abc import Iterable


def did_you_mean(word: object, names: Iterable[str]) -> str:
    """The nearest of ``names`` as the end of a message; empty if none is near.

    Example:
        >>> did_you_mean("adamm", ["adam", "sgd"])
        " (did you mean 'adam'?)"
    """
    close = difflib.get_close_matches(str(word).lower(), names, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
