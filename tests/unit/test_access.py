"""Joining a cluster: the token is taken where it is asked for, and whatever is wrong is told within seconds."""

import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import grpc
import pytest
import ray
from dashboards import dashboard

from raytorch import connect
from raytorch.cli.main import main
from raytorch.cluster import token as access
from raytorch.cluster.joining import joined_ray
from raytorch.cluster.token import mode_of
from raytorch.errors import ClusterError

TOKEN = "0123456789abcdef" * 4
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No address and no token but those of the test."""
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_USE_TLS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)


class Head(grpc.GenericRpcHandler):
    """The head of a cluster, as far as who joins it sees that at first.

    Attributes:
        token: What it asks for, None for nothing.
        seen: What it was shown each time.
        method: What it can be asked.
    """

    def __init__(self, token: str | None = None) -> None:
        self.token, self.seen = token, list[str | None]()
        self.method = access._SIGN_OF_LIFE

    def service(self, call: Any) -> Any:
        """Answer a call."""
        shown = dict(call.invocation_metadata).get("authorization")
        self.seen.append(shown)
        return grpc.unary_unary_rpc_method_handler(self._answer) if call.method == self.method else None

    def _answer(self, _: bytes, context: Any) -> bytes:
        if self.token is not None and self.seen[-1] != f"Bearer {self.token}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
        return b""


@contextmanager
def running(head: Head) -> Iterator[str]:
    """Run a head; answers its address."""
    server = grpc.server(ThreadPoolExecutor(2), handlers=[head])
    host = ray.util.get_node_ip_address()  # where Ray looks for a head at localhost
    port = server.add_insecure_port(f"{host}:0")
    server.start()
    try:
        yield f"{host}:{port}"
    finally:
        server.stop(None).wait()


def test_a_cluster_that_asks_for_no_token_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    head = Head()
    with running(head) as address:
        assert mode_of(address) == "disabled"
    assert head.seen == [None]


@pytest.mark.parametrize("host", [None, "localhost", "127.0.0.1"])
def test_the_token_is_found_where_ray_keeps_it_for_any_address(tmp_path: Path, host: str | None) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(f"{TOKEN}\n", encoding="utf-8")
    with running(Head(TOKEN)) as address:
        assert mode_of(f"{host}:{address.rpartition(':')[2]}" if host else address) == "token"


def test_a_refused_token_is_told_from_one_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(Head(TOKEN)) as address:
        with pytest.raises(ClusterError) as refusal:
            mode_of(address)
        places = (
            "give the cluster's token in one of RAY_AUTH_TOKEN, the file that RAY_AUTH_TOKEN_PATH names, and "
            "~/.ray/auth_token, which are looked into in this order"
        )
        assert str(refusal.value) == f"the cluster at {address} asks for a token, and there is none here; {places}"
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        with pytest.raises(ClusterError, match="asks for a token, and there is none here"):
            mode_of(address)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
        with pytest.raises(ClusterError) as refusal:
            mode_of(address)
        assert str(refusal.value) == f"the cluster at {address} refuses the token; {places}"
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        with pytest.raises(ClusterError, match=r"asks for a token, and RAY_AUTH_MODE=disabled keeps it from being"):
            mode_of(address)


def test_a_token_file_that_is_no_text_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(b"\xff\xfe")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(ClusterError, match="the token cannot be read: RAY_AUTH_TOKEN_PATH="):
        access.find_token()


def test_a_pipe_as_token_file_is_refused_and_not_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(ClusterError, match=r"the token cannot be read: RAY_AUTH_TOKEN_PATH=.*: it is not a file"):
        access.find_token()


@contextmanager
def nothing_there() -> Iterator[str]:
    with socket.socket() as taken:
        host = ray.util.get_node_ip_address()
        taken.bind((host, 0))
        yield f"{host}:{taken.getsockname()[1]}"


@contextmanager
def silent() -> Iterator[str]:
    host = ray.util.get_node_ip_address()
    with socket.create_server((host, 0)) as listener:
        yield f"{host}:{listener.getsockname()[1]}"


@contextmanager
def a_dashboard() -> Iterator[str]:
    host = ray.util.get_node_ip_address()
    with dashboard(host) as there:
        yield there.url.removeprefix("http://")


@contextmanager
def another_service() -> Iterator[str]:
    head = Head()
    head.method = "/some.other/Service"
    with running(head) as address:
        yield address


WRONG = [nothing_there, silent, a_dashboard]


@pytest.mark.parametrize(("wrong", "scheme"), [*product(WRONG, ["", "ray://"]), (another_service, "")])
def test_a_wrong_address_is_one_clear_error(
    wrong: Callable[[], Any], scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "ANSWER_S", 0.5)
    with wrong() as address, pytest.raises(ClusterError) as refusal, joined_ray(scheme + address):
        pass
    assert str(refusal.value).startswith(f"no Ray cluster answers at {scheme}{address} (")
    assert str(refusal.value).endswith("); is the address right? 'ray start --head' starts one")
    assert "\n" not in str(refusal.value)


def test_a_host_that_is_not_known_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "ANSWER_S", 2)
    with pytest.raises(ClusterError, match=r"^no Ray cluster answers at there-is-no-such-host\.invalid:6379 \("):
        mode_of("there-is-no-such-host.invalid:6379")


@pytest.mark.parametrize("address", ["head", "head:", ":6379", "head:port", "head:0x10", "unix:///tmp/x:1"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ClusterError, match=r"give the address of a cluster's head, as HOST:6379, or auto$"):
        mode_of(address)


def test_ray_joins_with_what_the_cluster_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []
    monkeypatch.setattr(ray, "init", lambda *_, **__: seen.append(os.environ.get("RAY_AUTH_MODE")))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    for head in (Head(TOKEN), Head()):
        with running(head) as address, joined_ray(address):
            assert "RAY_AUTH_MODE" not in os.environ
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with running(Head()) as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        with joined_ray():
            assert os.environ["RAY_AUTH_MODE"] == "token"
    assert seen == ["token", "disabled", "disabled"]


@pytest.mark.parametrize(
    "command",
    [
        ["train", CONFIGS / "quickstart.yaml"],
        ["scale", CONFIGS / "quickstart.yaml", "--workers", "1"],
        ["sweep", CONFIGS / "sweeps" / "digits.yaml"],
    ],
)
def test_a_command_with_a_wrong_address_ends_in_one_line_and_leaves_nothing(
    command: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with silent() as address:
        monkeypatch.setattr(sys, "argv", ["raytorch", *map(str, command), "--address", address])
        monkeypatch.setattr(access, "ANSWER_S", 0.5)
        with pytest.raises(SystemExit) as end:
            main()
    for thread in threading.enumerate():  # what a command imports beside the start of Ray
        if thread.daemon and "import_module" in thread.name:
            thread.join()
    assert end.value.code == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert error.startswith(f"no Ray cluster answers at {address} (")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_session_with_a_wrong_address_says_so() -> None:
    with nothing_there() as address, pytest.raises(ClusterError, match=r"^no Ray cluster answers at "):
        connect(workers=1, address=address)


def test_a_ray_needs_a_token_of_its_own_where_the_home_can_keep_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not access.needs_token_here()
    monkeypatch.setenv("HOME", str(tmp_path / "missing"))
    assert access.needs_token_here()
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert not access.needs_token_here()
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "one")
    assert not access.needs_token_here()
