"""The way into a Ray cluster: its token, and whether one answers at an address. Imports ray when used, and no torch."""

import os
import re
from pathlib import Path
from typing import Any

from raytorch.errors import ClusterError
from raytorch.system.regular_files import open_regular

ANSWER_S = 5.0
"""Within which a cluster has to answer who joins it; ``ray.init`` waits for 20 to 40 seconds, and tells no reasons."""
MODE = "RAY_AUTH_MODE"
TOKEN_PLACES = "RAY_AUTH_TOKEN, the file that RAY_AUTH_TOKEN_PATH names, and ~/.ray/auth_token"  # noqa: S105
_KUBERNETES = "RAY_ENABLE_K8S_TOKEN_AUTH"
_SIGN_OF_LIFE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
"""The call that Ray's own clients make to a head first (Ray 2.55 and 2.60)."""


def find_token() -> str | None:
    """The token of the cluster from the places where Ray keeps it, None if authentication is turned off here.

    Raises:
        ClusterError: The file that RAY_AUTH_TOKEN_PATH names cannot be read.
    """
    if os.environ.get(MODE, "token").lower() == "disabled":
        return None
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    try:
        path = Path(named) if named else Path.home() / ".ray" / "auth_token"
        with os.fdopen(open_regular(path), encoding="utf-8") as file:
            return file.read().strip() or None
    except (OSError, ValueError, RuntimeError) as error:  # the last where this user has no home
        if named:
            reason = getattr(error, "strerror", None) or error
            raise ClusterError(f"the token cannot be read: RAY_AUTH_TOKEN_PATH={named}: {reason}") from None
        return None


def needs_token_here() -> bool:
    """Tell whether a Ray that is started here has no token, and cannot keep one, as it does, in ``~/.ray``."""
    if find_token() or os.environ.get(MODE, "token").lower() == "disabled":
        return False
    try:
        home = Path.home()
    except RuntimeError:
        return True
    folder = home / ".ray"
    return not os.access(folder if folder.exists() else home, os.W_OK)


def mode_of(address: str) -> str | None:
    """How the cluster at an address that ``ray.init`` takes is joined: ``token`` or ``disabled``; None where Ray has to
    find out itself.

    Raises:
        ClusterError: No cluster answers there within seconds, it refuses the token, or asks for one that is not here.
    """
    target = _target(address)
    if target is None:
        return None
    import grpc

    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        if address.startswith("ray://"):
            try:
                grpc.channel_ready_future(channel).result(ANSWER_S)
            except grpc.FutureTimeoutError:
                raise ClusterError(_missing(address, "timed out")) from None
            return None
        if _is_let_in(channel, address, None):
            return "disabled"
        token = find_token()
        if token is None:
            if os.environ.get(_KUBERNETES, "").lower() in ("1", "true"):
                return None  # Ray has that of the pod's service account
            raise ClusterError(_refused(address, "asks for a token, and there is none here"))
        if not _is_let_in(channel, address, token):
            raise ClusterError(_refused(address, "refuses the token"))
        return "token"


def _target(address: str) -> str | None:
    """The host and port that ``ray.init`` would connect to; None if they are not to be asked."""
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return None
    if address.startswith("ray://"):
        return address.removeprefix("ray://").partition("/")[0]
    if address != "auto" and not re.fullmatch(r"[^\s/]+:\d{1,5}", address):
        raise ClusterError(f"{address}: give the address of a cluster's head, as HOST:6379, or auto")
    # How Ray finds the head of "auto", and the address that a head has where the host is this one (2.55 and 2.60).
    from ray._private.services import canonicalize_bootstrap_address

    try:
        return str(canonicalize_bootstrap_address(address))
    except ConnectionError as error:
        raise ClusterError(_missing(address, str(error).partition(".")[0])) from None


def _is_let_in(channel: Any, address: str, token: str | None) -> bool:
    """Tell whether the head gives a sign of life to who has this token, or none."""
    import grpc

    metadata = [("authorization", f"Bearer {token}")] if token else None
    try:
        channel.unary_unary(_SIGN_OF_LIFE)(b"", timeout=ANSWER_S, metadata=metadata)
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            return False
        if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            raise ClusterError(_missing(address, _last(error))) from None
        raise ClusterError(_missing(address, f"what answers there is no head of a cluster: {_last(error)}")) from None
    return True


def _last(error: Any) -> str:
    """Return what a call of gRPC failed of, without the layers that it went through."""
    return str(error.details()).rpartition(": ")[2]


def _missing(address: str, reason: str) -> str:
    return f"no Ray cluster answers at {address} ({reason}); is the address right? 'ray start --head' starts one"


def _refused(address: str, what: str) -> str:
    if os.environ.get(MODE, "").lower() == "disabled":
        return f"the cluster at {address} asks for a token, and {MODE}=disabled keeps it from being looked for here"
    return (
        f"the cluster at {address} {what}; give the cluster's token in one of {TOKEN_PLACES}, which are looked into in "
        "this order"
    )
