"""A small S3 server of the files in a folder, whose first folders are its buckets: listing, and reading by ranges.

As a process of its own it can be killed and started again on the same port, with the same files; on a thread of the
test it fails as it is told.

    python tests/s3_server.py FOLDER [PORT]
"""

import hashlib
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

PAGE = 1000
"""Objects in an answer to a listing."""


@dataclass
class Behaviour:
    """What the server on a thread does, and what it has been asked."""

    failing: int = 0
    """How many requests are still answered with ``status``."""
    status: int = 503
    short: int = 0
    """How many objects are still sent without their last byte, as a connection that breaks has it."""
    gate: threading.Event | None = None
    """Objects are sent as far as their middle, and the rest when it is set."""
    at_gate: threading.Event = field(default_factory=threading.Event)
    """Set when an object has been sent as far as its middle."""
    asked: Counter[str] = field(default_factory=Counter)
    """Requests by ``METHOD /path``."""
    sent: int = 0
    """Bytes of objects."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or a client waits 40 ms for the second write of each answer
    folder: Path
    behaviour: Behaviour

    def do_HEAD(self) -> None:
        self._answer(head=True)

    def do_GET(self) -> None:
        self._answer(head=False)

    def _answer(self, *, head: bool) -> None:
        parts, told = urlsplit(self.path), self.behaviour
        path = unquote(parts.path).strip("/")
        told.asked[f"{self.command} /{path}"] += 1
        if told.failing:
            told.failing -= 1
            self._error(told.status, {503: "SlowDown", 403: "AccessDenied"}.get(told.status, "InternalError"))
        elif "list-type=2" in parts.query:
            self._list(path, {key: values[0] for key, values in parse_qs(parts.query).items()})
        elif (file := self.folder / path).is_file():
            self._object(file, head=head)
        elif head and "/" not in path and file.is_dir():
            self._send(200, b"")
        else:
            self._error(404, "NoSuchKey")

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        root, prefix, after = self.folder / bucket, query.get("prefix", ""), query.get("continuation-token", "")
        if not root.is_dir():
            self._error(404, "NoSuchBucket")
            return
        delimiter, most = query.get("delimiter"), min(PAGE, int(query.get("max-keys", PAGE)))
        found: dict[str, str] = {}
        for file in sorted(path for path in root.rglob("*") if path.is_file()):
            key = file.relative_to(root).as_posix()
            if not key.startswith(prefix):
                continue
            rest = key[len(prefix) :]
            if delimiter and delimiter in rest:
                folder = prefix + rest.partition(delimiter)[0] + delimiter
                found[folder] = f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>"
            else:
                size, when, tag = _facts(file)
                found[key] = (
                    f"<Contents><Key>{escape(key)}</Key><Size>{size}</Size><ETag>{escape(tag)}</ETag>"
                    f"<LastModified>{when}</LastModified></Contents>"
                )
        keys = [key for key in sorted(found) if key > after]
        more = f"<NextContinuationToken>{escape(keys[most - 1])}</NextContinuationToken>" if len(keys) > most else ""
        body = "".join(found[key] for key in keys[:most])
        text = (
            '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{bucket}</Name><KeyCount>{len(keys[:most])}</KeyCount><MaxKeys>{most}</MaxKeys>"
            f"<IsTruncated>{str(bool(more)).lower()}</IsTruncated>{more}{body}</ListBucketResult>"
        )
        self._send(200, text.encode(), {"Content-Type": "application/xml"})

    def _object(self, file: Path, *, head: bool) -> None:
        size, _, tag = _facts(file)
        headers = {"ETag": tag, "Last-Modified": formatdate(file.stat().st_mtime, usegmt=True)}
        first, last, status = 0, size - 1, 200
        if wanted := self.headers.get("Range"):
            begin, _, end = wanted.removeprefix("bytes=").partition("-")
            first, last, status = int(begin), min(int(end or last), last), 206
            if first >= size:
                self._error(416, "InvalidRange")
                return
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        if head:
            self._send(200, b"", headers | {"Content-Length": str(size)})
            return
        with file.open("rb") as stream:
            stream.seek(first)
            self._send(status, stream.read(last - first + 1), headers, is_object=True)

    def _send(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, *, is_object: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        told = self.behaviour
        with suppress(OSError):  # the client has left
            if not is_object:
                self.wfile.write(body)
                return
            told.sent += len(body)
            if told.short:
                told.short -= 1
                body, self.close_connection = body[:-1], True
            self.wfile.write(body[: len(body) // 2])
            if told.gate:
                self.wfile.flush()
                told.at_gate.set()
                told.gate.wait()
            self.wfile.write(body[len(body) // 2 :])

    def _error(self, status: int, code: str) -> None:
        text = f'<?xml version="1.0"?><Error><Code>{code}</Code></Error>'
        self._send(status, b"" if self.command == "HEAD" else text.encode())

    def log_message(self, *_: object) -> None:
        pass


def _facts(file: Path) -> tuple[int, str, str]:
    from datetime import UTC, datetime

    found = file.stat()
    when = datetime.fromtimestamp(found.st_mtime, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
    return found.st_size, when, f'"{hashlib.md5(f"{found.st_size} {found.st_mtime_ns}".encode()).hexdigest()}"'


def _server(folder: Path, port: int, behaviour: Behaviour) -> ThreadingHTTPServer:
    handler = type("Handler", (_Handler,), {"folder": folder, "behaviour": behaviour})
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    server.daemon_threads = True
    return server


def uri(port: int, path: str, user: str = "key:secret@") -> str:
    """The address of a bucket or a folder in one."""
    return f"s3://{user}{path}?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"


@contextmanager
def serving(folder: Path) -> Iterator[tuple[int, Behaviour]]:
    """A server on a thread: its port, and how it behaves."""
    behaviour = Behaviour()
    with _server(folder, 0, behaviour) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server.server_address[1], behaviour
        server.shutdown()
        thread.join()


class S3Process:
    """A server in a process of its own, which can be killed and started again on the same port.

    Example:
        >>> with S3Process(folder) as server:
        ...     config = {"root": server.uri("bucket/data")}
        ...     server.kill()
        ...     server.start()
    """

    def __init__(self, folder: Path, program: str = __file__) -> None:
        """``program`` is called with the folder and the port, and prints ``ready`` when it takes requests."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._folder, self._program = folder, program
        self._process: subprocess.Popen[bytes] | None = None

    def uri(self, path: str, user: str = "key:secret@") -> str:
        return uri(self.port, path, user)

    def start(self) -> None:
        """Start it; returns when it takes requests."""
        command = [sys.executable, self._program, str(self._folder), str(self.port)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._process.stdout
        assert self._process.stdout.readline() == b"ready\n"

    def kill(self) -> None:
        """Kill it, in the middle of whatever it sends."""
        if self._process:
            assert self._process.stdout
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()
            self._process = None

    def __enter__(self) -> "S3Process":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


if __name__ == "__main__":
    with _server(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0, Behaviour()) as running:
        print("ready", flush=True)
        running.serve_forever()
