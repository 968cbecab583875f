"""An HTTP server of files, on a thread of the test, that misbehaves as it is told."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class FileServer:
    """Serves ``files`` while it is entered as a context manager.

    Attributes:
        files: Contents by name.
        ranges: Whether requests for a part are answered with that part.
        cut: Bytes of the body after which a connection is closed.
        pace_s: Seconds between the kilobytes of a body.
        answer: Writes raw bytes in place of any answer.
        requests: Name and Range header of each request so far.
    """

    files: dict[str, bytes]
    ranges: bool = True
    cut: int | None = None
    pace_s: float = 0
    answer: Callable[[Any], None] | None = None
    requests: list[tuple[str, str | None]] = field(default_factory=list)

    def __enter__(self) -> "FileServer":
        handler = type("Handler", (_Handler,), {"told": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    told: FileServer

    def do_GET(self) -> None:
        name, wanted = self.path.lstrip("/"), self.headers.get("Range")
        self.told.requests.append((name, wanted))
        if self.told.answer:
            self.told.answer(self.wfile)
        elif name in self.told.files:
            self._send(self.told.files[name], wanted if self.told.ranges else None)
        else:
            self.send_error(404)

    def _send(self, content: bytes, wanted: str | None) -> None:
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        body = content[start:][: self.told.cut]
        try:
            for at in range(0, len(body), 1024):
                self.wfile.write(body[at : at + 1024])
                time.sleep(self.told.pace_s)
        except OSError:
            pass  # the client was killed, as tests do

    def log_message(self, *_: object) -> None:
        pass
