"""Calls of a store that are made again until it answers: it is restarted, throttles, or the network is gone a while."""

import logging
import random
import re
import time
from collections.abc import Callable
from typing import TypeVar

from raytorch.errors import StorageError, message_of
from raytorch.system.safe_text import escaped_line

T = TypeVar("T")

PATIENCE_S = 600.0
"""How long a store may fail in a row; ranks that wait for another's batch do so for longer, ``scaling.timeout_s``."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 20.0
_REFUSED = re.compile(
    r"ACCESS_DENIED|INVALID_ACCESS_KEY|INVALID_CLIENT_TOKEN|UNRECOGNIZED_CLIENT|SIGNATURE_DOES_NOT_MATCH|EXPIRED_TOKEN"
    r"|MISSING_AUTHENTICATION_TOKEN|NO_SUCH_BUCKET|PERMISSION_DENIED|UNAUTHENTICATED|permanent redirect"
    r"|Permanent error|Bucket '.*' not found|Unable to load lib"
    r"|HTTP status (?:301|400|401|403|404)\b|\b(?:401 Unauthorized|403 Forbidden|404 Not Found)\b",
    re.IGNORECASE,
)
"""What clients say of requests that would be refused another time too."""
_SPEAKS_HTTP = re.compile(r"wrong version number|packet length too long", re.IGNORECASE)
"""What OpenSSL says of a server that answers without encryption."""

logger = logging.getLogger("raytorch")


def retrying(place: str, call: Callable[[], T], patience: float | None = None) -> T:
    """Call until it answers, with longer and longer pauses. ``place`` is what messages name.

    What is not there raises FileNotFoundError as it is. Raises StorageError at once for what the store refuses, and for
    any other OSError, or StorageError, once that has gone on for ``patience`` seconds, :data:`PATIENCE_S` by default.

    Example:
        >>> retrying("s3://bucket/x", lambda: 1)
        1
    """
    failures = _Failures(place, PATIENCE_S if patience is None else patience)
    while True:
        try:
            answer = call()
        except FileNotFoundError:
            raise
        except (OSError, StorageError) as error:
            failures.add(error)
        else:
            failures.end()
            return answer


class _Failures:
    """Those of one call."""

    def __init__(self, place: str, patience: float) -> None:
        self._place, self._patience = place, patience
        self._count, self._began = 0, time.monotonic()

    def add(self, error: Exception) -> None:
        """Wait before another try. Raises StorageError if there is none."""
        reason = message_of(error).partition("\n")[0]
        if isinstance(error, PermissionError) or _REFUSED.search(reason):
            raise StorageError(f"{self._place}: the store refuses: {reason}; check your access to it") from None
        if _SPEAKS_HTTP.search(reason):
            raise StorageError(
                f"{self._place}: the store speaks http, not https: {reason}; add scheme=http to its address, as in "
                "s3://bucket/data?endpoint_override=HOST:PORT&scheme=http"
            ) from None
        self._count += 1
        spent = time.monotonic() - self._began
        if spent >= self._patience:
            raise StorageError(
                f"{self._place}: the store has failed {self._count} times in a row, for {spent:.0f} s; the last time: "
                f"{reason}"
            ) from None
        if self._count == 1:
            place, text = escaped_line(self._place), escaped_line(reason)
            logger.warning("%s: %s; it is tried again for up to %.0f s", place, text, self._patience)
        pause(self._count)

    def end(self) -> None:
        """There has been an answer."""
        if self._count:
            logger.warning("%s: the store answers, after %d tries in vain", escaped_line(self._place), self._count)


def pause(tries: int) -> None:
    """Wait after so many tries, less or more at random, so that processes that failed at once do not come back so."""
    longest = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(tries - 1, 10))
    time.sleep(longest * random.uniform(0.5, 1.0))  # noqa: S311 (no secret)
