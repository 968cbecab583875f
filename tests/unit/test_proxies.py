"""What a cluster is asked goes past the proxy that is set for the web, which could read its token."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

import pytest
from dashboards import Dashboard, dashboard, send_json

from raytorch import Client
from raytorch.errors import ClusterError
from raytorch.service import dashboard as connection

TOKEN = "0123456789abcdef" * 4
HEAD = "head.invalid:8265"
"""A name that the proxy alone knows."""


class Proxy:
    """What a proxy has been asked, by method and URL, and each Authorization that it was shown."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.seen: list[str] = []
        self.shown: set[str | None] = set()


@contextmanager
def proxy(to: Dashboard) -> Iterator[Proxy]:
    """Run a proxy that forwards what is asked of HEAD to a dashboard, and makes no tunnels."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = urlsplit(self.path)
            if not asked.path.startswith("/storage/"):  # of a store that a test before has given up, and is still asked
                there.seen.append(f"{self.command} {self.path}")
                there.shown.add(self.headers.get("Authorization"))
            if asked.netloc != HEAD:
                self.send_error(502)
                return
            headers = {"Authorization": self.headers.get("Authorization", "")}
            request = Request(f"{to.url}{asked.path}", headers=headers)
            try:
                answer = build_opener(ProxyHandler({})).open(request)
            except HTTPError as error:
                answer = error
            self.send_response(answer.status)
            self.end_headers()
            self.wfile.write(answer.read())

        def do_CONNECT(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        there = Proxy(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        try:
            yield there
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "RAYTORCH_PROXY", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setattr(connection, "ANSWER_S", 2.0)


@pytest.fixture
def there() -> Iterator[Dashboard]:
    with dashboard() as told:
        told.routes["/api/jobs/"] = send_json([])
        yield told


@pytest.fixture
def between(there: Dashboard) -> Iterator[Proxy]:
    with proxy(there) as found:
        yield found


def set_for_the_web(monkeypatch: pytest.MonkeyPatch, proxy: Proxy) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, proxy.url)


def test_a_dashboard_on_this_machine_is_asked_itself(
    there: Dashboard, between: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_for_the_web(monkeypatch, between)
    monkeypatch.setenv("RAYTORCH_PROXY", between.url)
    for url in (there.url, there.url.replace("127.0.0.1", "localhost")):
        assert Client(url).jobs() == []
    assert between.seen == []


def test_the_proxy_of_the_web_is_not_shown_the_token(between: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    set_for_the_web(monkeypatch, between)
    with pytest.raises(ClusterError) as refusal:
        Client(f"http://{HEAD}")
    assert between.seen == []
    assert str(refusal.value).startswith(f"no Ray cluster answers at http://{HEAD} (")
    assert str(refusal.value).endswith(
        "? http_proxy is not used for clusters, whose token it could read: if one is to be used all the same, name it "
        "in RAYTORCH_PROXY"
    )


def test_a_proxy_that_was_named_for_clusters_is_used(
    there: Dashboard, between: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYTORCH_PROXY", between.url)
    assert Client(f"http://{HEAD}").jobs() == []
    assert {f"GET http://{HEAD}/api/version", f"GET http://{HEAD}/api/jobs/"} <= set(between.seen)
    assert between.shown == {authorization for _, _, authorization in there.seen} == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize("without", ["head.invalid", "*", "other.invalid, .invalid"])
def test_no_proxy_is_respected(between: Proxy, monkeypatch: pytest.MonkeyPatch, without: str) -> None:
    monkeypatch.setenv("RAYTORCH_PROXY", between.url)
    monkeypatch.setenv("no_proxy", without)
    with pytest.raises(ClusterError, match="no Ray cluster answers"):
        Client(f"http://{HEAD}")
    assert between.seen == []


@pytest.mark.parametrize("name", ["https_proxy", "RAYTORCH_PROXY"])
def test_https_goes_through_a_tunnel_in_which_the_token_is_unseen(
    between: Proxy, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, between.url)
    with pytest.raises(ClusterError, match=r"no Ray cluster answers at https:.*502"):
        Client(f"https://{HEAD}")
    assert (between.seen, between.shown) == ([f"CONNECT {HEAD}"], {None})


@pytest.mark.parametrize("value", ["http:/proxy:3128", "http://", "http://[x"])
def test_a_proxy_that_is_no_url_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("RAYTORCH_PROXY", value)
    with pytest.raises(ClusterError, match="http://head"):
        Client(f"http://{HEAD}")


@pytest.mark.parametrize("url", [f"http://{'a' * 64}:8265", "http://[::1", "http://head..invalid"])
def test_a_url_that_names_no_host_is_one_clear_error(url: str) -> None:
    with pytest.raises(ClusterError):
        Client(url)
