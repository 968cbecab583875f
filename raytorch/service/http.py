"""Requests to one HTTP server: never led elsewhere, with answers that end. Imports neither torch nor ray.

What carries a token goes to the server that was named and to no other: a redirect is refused. The bytes of an answer
and the time that it may take, name look-up and headers included, are bounded; of one that is read as it comes every
wait is, and the whole if its reader says so. Nothing is unpacked, so no answer grows.
A proxy that is set for the web is used for HTTPS alone, of which it sees nothing.
"""

import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from email.message import Message
from http.client import IncompleteRead
from ipaddress import ip_address
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode, urlsplit
from urllib.request import HTTPErrorProcessor, ProxyHandler, Request, build_opener, getproxies, proxy_bypass

from raytorch.errors import ClusterError, Remedy
from raytorch.system.safe_text import cut, escaped

MOST_BYTES = 64 * 1024**2
"""Of an answer: thousands of jobs, or ten thousand nodes."""
WITHIN_S = 60.0
"""For a whole answer, what is sent to get it aside."""
SLOWEST = 64 * 1024
"""Bytes per second at which what is sent has to go."""
BLOCK = 64 * 1024
LONGEST_WORDS = 2000
"""Characters that are shown of what a server says."""
QUEUED = 16
"""Blocks of an answer that wait for their reader."""

PROXY = "RAYTORCH_PROXY"
"""Environment variable that names the proxy to clusters, which sees what is asked of them by HTTP, and the token."""


@dataclass(frozen=True)
class Response:
    """An answer, with the names that Ray's clients know it by."""

    url: str
    status_code: int
    reason: str
    headers: Message
    content: bytes = b""

    @property
    def text(self) -> str:
        """The content, whatever bytes it has."""
        return self.content.decode(errors="replace")

    def json(self) -> Any:
        """The JSON in the content. Raises ValueError if it is none."""
        try:
            return json.loads(self.content)
        except RecursionError:
            raise ValueError("the JSON of the answer is nested too deeply") from None

    def raise_for_status(self) -> None:
        """Raise RuntimeError for a status that tells of a failure."""
        if self.status_code >= 400:
            raise RuntimeError(f"Request failed with status code {self.status_code}: {self.text}")


class Server:
    """One HTTP server, by the URL that all that is asked for is below; ``headers`` go with each request."""

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        self.url, self._headers = url, dict(headers)
        # Once: from Python 3.12 on it reads all certificates of the machine.
        self._opener = build_opener(ProxyHandler(_proxies(url)), _Answers())

    def passes_proxy(self) -> bool:
        """Tell whether a proxy that is set for the web would be between here and the server, if it were used."""
        host = urlsplit(self.url).hostname or ""
        web = self.url.startswith("http://") and "http" in getproxies()
        return web and not (os.environ.get(PROXY) or _is_here(host) or proxy_bypass(host))

    def ask(
        self,
        path: str,
        *,
        method: str = "GET",
        content: bytes | None = None,
        kind: str = "application/octet-stream",
        within: float | None = None,
        most: int | None = None,
    ) -> Response:
        """Send a request, with ``content`` of the media type ``kind`` if there is any, and wait for all of the answer.

        Raises ClusterError if the server redirects elsewhere, or answers with more than ``most`` bytes; HTTPException
        or OSError if there is no answer, or none within ``within`` seconds (TimeoutError).
        """
        request = Request(f"{self.url}{path}", content, self._headers | {"Content-Type": kind}, method=method)  # noqa: S310
        seconds, most = within or WITHIN_S + len(content or b"") / SLOWEST, most or MOST_BYTES
        deadline = time.monotonic() + seconds
        with closing(_Reader(lambda: self._opener.open(request, timeout=seconds))) as reader:
            answer: Response = reader.next(seconds)
            blocks = iter(lambda: reader.next(max(0.0, deadline - time.monotonic())), b"")
            refusal = f"{self.url} answers with more than {most / 1024**2:,.1f} MiB, as no Ray dashboard does"
            return replace(answer, content=joined(blocks, most, refusal))

    def read(self, path: str, query: Mapping[str, Any], within: float | None = None) -> Iterator[bytes]:
        """Yield the content of an answer as it comes, however long it is; every wait is bounded.

        Raises ClusterError if the server redirects elsewhere; HTTPException or OSError if the answer breaks off, tells
        of a failure (HTTPError), or is not whole after ``within`` seconds (TimeoutError).
        """
        request = Request(f"{self.url}{path}?{urlencode(query)}", headers=self._headers)  # noqa: S310
        deadline = time.monotonic() + (within or float("inf"))
        with closing(_Reader(lambda: self._opener.open(request, timeout=WITHIN_S))) as reader:
            answer: Response = reader.next(WITHIN_S)
            if answer.status_code != 200:
                raise HTTPError(answer.url, answer.status_code, answer.reason, answer.headers, None)
            while block := reader.next(WITHIN_S):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the answer is not whole after {within:g} s")
                yield block


class _Reader:
    """Reads an answer in a thread of its own: some waits for it have no bound of their own, nor take Ctrl-C."""

    def __init__(self, opening: Callable[[], Any]) -> None:
        self._open = opening
        self._pieces: queue.Queue[Any] = queue.Queue(QUEUED)
        self._closed = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def next(self, within: float) -> Any:
        """The :class:`Response` without its content, then the bytes of that, a block at a time, and none at the end."""
        try:
            piece = self._pieces.get(timeout=within)
        except queue.Empty:
            raise TimeoutError("timed out") from None
        if isinstance(piece, Exception):
            raise piece
        return piece

    def close(self) -> None:
        """Stop reading."""
        self._closed.set()
        with suppress(queue.Empty):  # a thread that waits for room goes on, and sees it
            while True:
                self._pieces.get_nowait()

    def _read(self) -> None:
        try:
            with closing(self._open()) as response:
                self._pieces.put(Response(response.url, response.status, response.reason, response.headers))
                for block in _blocks(response):
                    self._pieces.put(block)
                    if self._closed.is_set():
                        break
            self._pieces.put(b"")
        except Exception as error:
            self._pieces.put(error)


class _Answers(HTTPErrorProcessor):
    """Passes on answers of any status but redirects, which would take the token along."""

    def http_response(self, request: Request, response: Any) -> Any:
        if response.status not in (301, 302, 303, 307, 308):
            return response
        response.close()
        raise ClusterError(
            f"{request.full_url} redirects to {readable(response.headers.get('Location', 'nowhere'))}, where the token "
            "is not sent; if that is the cluster, give its URL as the address",
            remedies=[Remedy("address")],
        )

    https_response = http_response


def _proxies(url: str) -> dict[str, str]:
    """The proxies on the way to a server, by the scheme of its URL; none of those for hosts in ``no_proxy``."""
    if _is_here(urlsplit(url).hostname or ""):
        return {}
    if named := os.environ.get(PROXY):
        return {"http": named, "https": named}
    return {scheme: proxy for scheme, proxy in getproxies().items() if scheme == "https"}


def _is_here(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def readable(text: str) -> str:
    """Return what a server said, as it may be shown: without what commands a terminal, and not without end."""
    return escaped(cut(text, LONGEST_WORDS))


def joined(blocks: Iterable[bytes], most: int, refusal: str) -> bytes:
    """All of ``blocks``; raises ClusterError, which says ``refusal``, if they have more than ``most`` bytes."""
    kept, size = [], 0
    for block in blocks:
        kept.append(block)
        size += len(block)
        if size > most:
            raise ClusterError(refusal)
    return b"".join(kept)


def _blocks(response: Any) -> Iterator[bytes]:
    left = response.length  # None if only the end of the connection, or of the chunks, tells
    while left is None or left > 0:
        block = response.read1(BLOCK if left is None else min(BLOCK, left))
        if not block:
            break
        left = None if left is None else left - len(block)
        yield block
    if left:
        raise IncompleteRead(b"", left)
