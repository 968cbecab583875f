"""Text made fit to be shown: it cannot command the terminal, holds no secret of a storage's address, and ends."""

import re

LONGEST = 64 * 1024
"""Characters that are kept of what an exception says, and of its traceback."""
_MARK = 64
"""Characters that :func:`cut` has for saying how much is missing."""
_COMMANDING = "\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff"
"""Control characters but tab and line feed, those that change the direction of text, and halves of characters."""
_TEXT = re.compile(f"[{_COMMANDING}]")
_LINE = re.compile(f"[{_COMMANDING}\t\n]")
_LOG = re.compile(rf"(\x1b\[[0-9;]*m)|(?!\r)[{_COMMANDING}]")
_WORD = re.compile(r"[^\s'\"]+")
_ADDRESS = re.compile(
    r"(\b(?:((?i:s3a?|gc?s|abfss?|wasbs?))|[A-Za-z][\w+.-]{0,31})://)"
    # key:secret@, and the secret may hold what it should not; what looks like a port is none before a bucket
    r"(?:[^\s/'\"?#@:]*:(?(2)|(?!\d+(?:[/?#\s'\"]|$)))[^\s'\"]*@"
    r"|[^\s/'\"?#]*@)"
)
_OPTION = re.compile(
    r"([?&][\w.-]{0,63}(?:secret|token|password|credential|signature|key)[\w.-]{0,63}=)[^\s&'\"#]+", re.IGNORECASE
)


def without_secrets(text: str) -> str:
    """``text`` with ``***`` in place of what stands before the @ of a URI, and of what its options keep secret."""
    if "://" not in text:
        return text
    return _OPTION.sub(r"\1***", _WORD.sub(_without_user, text))


def _without_user(word: re.Match[str]) -> str:
    before, at, behind = word[0].rpartition("@")  # what ends with an @ is searched in one go, however long it is
    return _ADDRESS.sub(r"\1***@", before + at) + behind if "://" in before else word[0]


def escaped(text: object) -> str:
    """``text`` without secrets, and with escapes for what would move the cursor, set a title, or hide what follows."""
    return _TEXT.sub(_escaped, without_secrets(str(text)))


def escaped_line(text: object) -> str:
    """As :func:`escaped`, on one line."""
    return _LINE.sub(_escaped, without_secrets(str(text)))


def escaped_log(text: str) -> str:
    """As :func:`escaped`, but for colours, and for the carriage returns of progress bars."""
    return _LOG.sub(lambda found: found[1] or _escaped(found), text)


def cut(text: str, most: int = LONGEST) -> str:
    """``text`` in at most ``most`` characters: of a longer one the head and the tail, and between them how much is
    missing."""
    if len(text) <= most:
        return text
    half = (most - _MARK) // 2
    return f"{text[:half]} ... {len(text) - 2 * half:,} characters ... {text[-half:]}"


def _escaped(found: re.Match[str]) -> str:
    return ascii(found[0])[1:-1]
