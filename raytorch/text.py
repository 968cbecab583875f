"""Text that somebody else wrote, a file or a job, made fit to be shown: it cannot command the terminal."""

import re

_COMMANDING = "\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff"
"""Control characters but tab and line feed, those that change the direction of text, and halves of characters."""
_TEXT = re.compile(f"[{_COMMANDING}]")
_LINE = re.compile(f"[{_COMMANDING}\t\n]")
_LOG = re.compile(rf"(\x1b\[[0-9;]*m)|(?!\r)[{_COMMANDING}]")


def shown(text: object) -> str:
    """``text`` with escapes in place of what would move the cursor, set a title, or hide what follows."""
    return _TEXT.sub(_escaped, str(text))


def shown_line(text: object) -> str:
    """As :func:`shown`, on one line."""
    return _LINE.sub(_escaped, str(text))


def shown_log(text: str) -> str:
    """As :func:`shown`, but for colours, and for the carriage returns of progress bars."""
    return _LOG.sub(lambda found: found[1] or _escaped(found), text)


def _escaped(found: re.Match[str]) -> str:
    return ascii(found[0])[1:-1]
