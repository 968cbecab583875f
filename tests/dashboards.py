"""A server in the place of a Ray dashboard, which answers as a test has it, and remembers what it was sent."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

VERSION = {"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""}
NODE = {"node_id": "f" * 56, "node_ip": "10.0.0.1", "is_head_node": False, "node_name": "n", "labels": {}} | {
    "state": "ALIVE",
    "resources_total": {"CPU": 2.0},
    "state_message": None,
}
NODES = {
    "result": True,
    "msg": "",
    "data": {"result": {"result": [NODE], "total": 1, "num_after_truncation": 1, "num_filtered": 1}},
}
"""An answer of ``/api/v0/nodes``."""
Answering = Callable[[Any], None]
"""Writes the answer to a request, given its ``BaseHTTPRequestHandler``."""


@dataclass
class Dashboard:
    """What the server knows.

    Attributes:
        url: Its URL.
        routes: Who answers a path, or the paths that begin with it; the longest counts. Anything else is not found.
        seen: Method, path and Authorization of each request so far.
        leaving: Set when the server ends; an endless answer looks at it.
    """

    url: str = ""
    routes: dict[str, Answering] = field(default_factory=dict)
    seen: list[tuple[str, str, str | None]] = field(default_factory=list)
    leaving: threading.Event = field(default_factory=threading.Event)

    def answer(self, request: Any) -> None:
        request.rfile.read(int(request.headers.get("Content-Length") or 0))
        self.seen.append((request.command, request.path, request.headers.get("Authorization")))
        known = [path for path in self.routes if request.path.startswith(path)]
        if known:
            self.routes[max(known, key=len)](request)
        else:
            send(404, b"not here")(request)


def send(status: int, body: bytes, **headers: str) -> Answering:
    """An answer with these headers; an underscore in their names stands for a hyphen."""

    def answer(request: Any) -> None:
        request.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        request.wfile.write(body)

    return answer


def send_json(content: Any) -> Answering:
    """An answer with a JSON."""
    return send(200, json.dumps(content).encode())


def raw(*pieces: bytes) -> Answering:
    """An answer of these bytes, status line and headers included."""

    def answer(request: Any) -> None:
        for piece in pieces:
            request.wfile.write(piece)

    return answer


@contextmanager
def dashboard(host: str = "127.0.0.1") -> Iterator[Dashboard]:
    """Run a server that is taken for a dashboard; its routes may be changed meanwhile."""
    told = Dashboard(routes={"/api/version": send_json(VERSION)})

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            with suppress(OSError):  # who asked has gone, as tests do
                told.answer(self)

        def do_GET(self) -> None:
            self.handle_any()

        def do_POST(self) -> None:
            self.handle_any()

        def do_PUT(self) -> None:
            self.handle_any()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer((host, 0), Handler) as server:
        server.daemon_threads = True
        told.url = f"http://{host}:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        try:
            yield told
        finally:
            told.leaving.set()
            server.shutdown()
            thread.join()
