"""Download files whose size and SHA-256 are known: from several mirrors, retried, resumed, and verified.

Uses urllib of the standard library: torchvision's utilities neither resume nor time out, fall back from https to http,
and cost the import of torch.
"""

import hashlib
import os
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from raytorch.system.regular_files import open_regular

DownloadCallback = Callable[[str, int, int], None]
"""Called with a file's name, how many of its bytes are there, and how many it has."""

_PAUSES_S = (0, 1, 4)
_TIMEOUT_S = 30
_CHUNK = 2**18


@dataclass(frozen=True)
class RemoteFile:
    """A published file; ``mirrors`` are the URLs of folders that hold it, each ending in a slash."""

    name: str
    size: int
    sha256: str
    mirrors: tuple[str, ...]

    def is_in(self, path: Path) -> bool:
        """Tell whether the file at ``path`` is this one, byte for byte."""
        if path.stat().st_size != self.size:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == self.sha256


def fetch(remote: RemoteFile, path: Path, watch: DownloadCallback) -> None:
    """Download to ``path``, going on with what an interrupted download left there.

    Tries each mirror in turn, three times over. Raises OSError with the reason of each. Until this returns, nothing can
    be said about what is at ``path``. One process at a time.
    """
    reasons: dict[str, str] = {}
    for pause in _PAUSES_S:
        time.sleep(pause)
        for mirror in remote.mirrors:
            url = mirror + remote.name
            try:
                _fetch_from(url, remote, path, watch)
            except (OSError, HTTPException) as error:
                reasons[url] = f"{error}" or type(error).__name__
            else:
                return
    raise OSError("; ".join(f"{url}: {reason}" for url, reason in reasons.items()))


def _fetch_from(url: str, remote: RemoteFile, path: Path, watch: DownloadCallback) -> None:
    resumed = True
    while resumed:
        resumed = _receive(url, remote, path, watch)
        if remote.is_in(path):
            return
        path.unlink()  # what it was resumed from may have been another mirror's fault: once more, from the start
    raise OSError("serves other bytes than those published (by their SHA-256)")


def _receive(url: str, remote: RemoteFile, path: Path, watch: DownloadCallback) -> bool:
    """Append to ``path`` until it has the file's size; answers whether anything that was there is part of it."""
    there = path.stat().st_size if path.exists() else 0
    if there >= remote.size:
        return True
    headers = {"User-Agent": "raytorch", **({"Range": f"bytes={there}-"} if there else {})}
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 (the mirrors are constants)
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:  # noqa: S310
        given = str(response.headers.get("Content-Range"))
        resumed = response.status == 206 and given.startswith(f"bytes {there}-")
        there = there if resumed else 0
        flags = os.O_WRONLY | os.O_CREAT | (os.O_APPEND if resumed else os.O_TRUNC)
        with os.fdopen(open_regular(path, flags), "ab" if resumed else "wb") as file:
            while there < remote.size and (chunk := response.read1(min(_CHUNK, remote.size - there))):
                file.write(chunk)
                there += len(chunk)
                watch(remote.name, there, remote.size)
    if there < remote.size:
        raise OSError(f"ended after {there:,} of {remote.size:,} bytes")
    return resumed
