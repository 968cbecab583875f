"""Logs of a job's driver: all of it, its end, or followed until the job ends. Imports neither torch nor ray.

Ray's Jobs API gives logs as text, which it does not do for bytes that are no UTF-8, and in messages that lines of
megabytes do not fit into. Its State API gives the bytes of the file, of which those that were told already are skipped.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from glob import escape
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode

from raytorch.errors import ClusterError
from raytorch.service.dashboard import DashboardConnection
from raytorch.service.http import joined

POLL_S = 1.0
BLOCK = 1024**2
PATIENCE_S = 60.0
"""How long a cluster may give no answer while a job on it is followed."""
MOST_BYTES = 256 * 1024**2
"""Of a log that is read at once."""
TAIL_LINES, TAIL_BYTES = 2000, 1024**2
"""Of a log's end, in which the reason of a failure is looked for."""
SHARE = 10
"""A log is read anew after so many times what reading it took, so that a long one does not keep its node busy."""
LONGEST_PAUSE_S = 30.0
READING_S, TAILING_S = 600.0, 60.0
"""Within which a log has to have come that is read at once, and the end of one."""

logger = logging.getLogger("raytorch")


class JobLog:
    """The log of a job's driver, which is on the node where that runs."""

    def __init__(self, connection: DashboardConnection, job_id: str) -> None:
        self._connection, self._job_id = connection, job_id
        self._file = f"job-driver-{job_id}.log"

    def read(self, details: Any) -> str:
        """All that is there. Raises ClusterError if it is too long, or the cluster does not give it."""
        with self._connection.explaining(self._job_id):
            return whole(self._blocks(details, within=READING_S), self._job_id)

    def tail(self, details: Any) -> str:
        """Its end, as far as the cluster gives it."""
        kept = b""
        try:
            with self._connection.explaining(self._job_id):
                for block in self._blocks(details, lines=TAIL_LINES, within=TAILING_S):
                    kept = (kept + block)[-TAIL_BYTES:]
        except ClusterError as error:
            logger.warning("the log of %s cannot be read: %s", self._job_id, error)
        return kept.decode(errors="replace")

    def follow(self, states: Iterable[Any]) -> Iterator[bytes]:
        """Yield what is written, until the last of ``states``, Ray's ``JobDetails``, tells of the job's end.

        Whatever breaks on the way is read again from where it broke, without telling anything twice.
        """
        told, due = 0, 0.0
        for details in states:
            ended = details.status.is_terminal()
            if not ended and time.monotonic() < due:
                continue
            began = time.monotonic()
            for block in self._fresh(details, told, PATIENCE_S if ended else 0):
                told += len(block)
                yield block
            now = time.monotonic()
            due = now + min(SHARE * (now - began), LONGEST_PAUSE_S)

    def _fresh(self, details: Any, told: int, patience: float) -> Iterator[bytes]:
        """Read what is behind the first ``told`` bytes; what breaks is tried again for ``patience`` seconds."""
        deadline = time.monotonic() + patience
        while True:
            try:
                for block in behind(self._blocks(details), told):
                    told += len(block)
                    yield block
            except (OSError, HTTPException, ClusterError) as error:
                if not patience:
                    return  # the next time
                if time.monotonic() > deadline:
                    logger.warning("the end of the log of %s cannot be read: %s", self._job_id, error)
                    return
                time.sleep(POLL_S)
            else:
                return

    def _blocks(self, details: Any, lines: int = -1, within: float | None = None) -> Iterator[bytes]:
        """Read what is there, or the last ``lines`` lines of it, in ``within`` seconds if it is not followed."""
        if details.driver_node_id is None:  # it has not started, or never did
            return
        query = {"node_id": details.driver_node_id, "filename": self._file, "lines": lines, "timeout": int(READING_S)}
        try:
            yield from self._connection.server.read("/api/v0/logs/file", query, within)
        except HTTPError as error:
            if error.code != 500 or self._is_there(details):
                raise

    def _is_there(self, details: Any) -> bool:
        """Tell whether the node has the file, as far as the cluster knows."""
        query = urlencode({"node_id": details.driver_node_id, "glob": escape(self._file)})
        listed = self._connection.server.ask(f"/api/v0/logs?{query}", most=BLOCK)
        return listed.status_code != 200 or self._file.encode() in listed.content


def whole(blocks: Iterable[bytes], log: str) -> str:
    """All of a log, which messages call ``log``. Raises ClusterError if it is too long."""
    refusal = f"the log of {log} is longer than {MOST_BYTES / 1024**2:g} MiB; follow it, which gives it as it comes"
    return joined(blocks, MOST_BYTES, refusal).decode(errors="replace")


def behind(blocks: Iterable[bytes], told: int) -> Iterator[bytes]:
    """Read what comes after the first ``told`` bytes."""
    for block in blocks:
        fresh = block[told:]
        told -= len(block) - len(fresh)
        if fresh:
            yield fresh


def states(ask: Callable[[str], Any], job_id: str) -> Iterator[Any]:
    """Yield what ``ask`` tells of a job, a moment apart, up to its end; a cluster may be silent for a while.

    Raises ClusterError if it does not answer for long, and JobNotFoundError if there is no such job.
    """
    heard = time.monotonic()
    while True:
        try:
            details = ask(job_id)
        except ClusterError:
            if time.monotonic() - heard > PATIENCE_S:
                raise
        else:
            heard = time.monotonic()
            yield details
            if details.status.is_terminal():
                return
        time.sleep(POLL_S)
