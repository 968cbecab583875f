"""Joining Ray: a cluster that runs, or one that is started here for as long as it is needed. Imports no torch."""

import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from secrets import token_hex
from typing import Any

from raytorch.cluster import token
from raytorch.errors import ClusterError, UserError
from raytorch.system.processes import kill_writers
from raytorch.system.temporary_folders import delete_abandoned, note_ray_session

_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
_CONFINING = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Read when ray is imported: 0 makes 127.0.0.1 the node's address, as on macOS (Ray 2.60)."""

# One machine needs neither a watcher for nodes that a cloud takes back nor metrics for a dashboard, and a short run
# should not wait two seconds until it is seen to have ended. Ray runs workers at niceness 15, behind all else that the
# machine does; here they are what it is used for.
_EMBEDDED_SETTINGS = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_worker_niceness": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Nothing listens beyond this machine.
    _CONFINING: "0",
    "GLOO_SOCKET_IFNAME": _LOOPBACK,
    "NCCL_SOCKET_IFNAME": _LOOPBACK,
    # raytorch says itself, in a line, when a worker or the raylet was lost.
    "RAY_DEDUP_LOGS_SKIP_REGEX": "A worker died or was killed|Raylet is terminated|has been marked dead",
}

_OWN_TOKEN = token_hex(32)
"""Of every Ray that this process starts where the user's home cannot take one: Ray keeps the first that it has read."""
_set_here: set[str] = set()
"""Settings that are to go again, as other processes that this one starts may join a cluster."""
_AGENTS = ("ray::DashboardA", "ray::RuntimeEnv")
"""How the names of the processes begin that a raylet starts to help it (Ray 2.60)."""
_is_confined = False
"""True if ray was imported to be used on this machine alone, which lasts for as long as the process."""


@dataclass(frozen=True, eq=False)
class _Joined:
    """The Ray that a :func:`joined_ray` has joined."""

    session: Path | None
    """The folder of its logs, if it was started here."""


_joined: _Joined | None = None
_leaving = threading.RLock()
_before_sigterm: list[Any] = []
"""The handlers of SIGTERM that were there before each :func:`joined_ray` that goes on."""


def cluster_address(address: str | None) -> str | None:
    """The address of the cluster to join: ``address``, else RAY_ADDRESS; None if a Ray is to be started here.

    A URL in RAY_ADDRESS is that of a dashboard, where jobs are sent, and no cluster to join.

    Raises:
        UserError: ``address`` is such a URL.
    """
    if address and _is_dashboard(address):
        raise UserError(
            f"{address} is the URL of a dashboard, which 'raytorch submit' takes; to join a cluster from here, as "
            "'raytorch train' does, give HOST:6379 or auto"
        )
    there = os.environ.get("RAY_ADDRESS", "")
    return address or ("" if _is_dashboard(there) else there) or None


def _is_dashboard(address: str) -> bool:
    return address.startswith(("http://", "https://"))


@contextmanager
def _without_dashboard() -> Iterator[None]:
    """Hide a RAY_ADDRESS that is a dashboard's from ``ray.init``, which would join it, and from what that starts."""
    hidden = os.environ.get("RAY_ADDRESS", "")
    if not _is_dashboard(hidden):
        yield
        return
    del os.environ["RAY_ADDRESS"]
    try:
        yield
    finally:
        os.environ["RAY_ADDRESS"] = hidden


def prepare_ray(address: str | None) -> bool:
    """Choose Ray's settings for one machine, if :func:`joined_ray` will start a Ray here; answers whether it will.

    Comes before the first import of ray. What the environment says already stays.

    Raises:
        UserError: As for :func:`cluster_address`.
    """
    global _is_confined
    if cluster_address(address) or _has_joined():
        return False
    _is_confined |= "ray" not in sys.modules
    early = set() if _is_confined else {_CONFINING}
    for name in _EMBEDDED_SETTINGS.keys() - os.environ.keys() - early:
        os.environ[name] = _EMBEDDED_SETTINGS[name]
        _set_here.add(name)
    if token.needs_token_here():
        os.environ["RAY_AUTH_TOKEN"] = _OWN_TOKEN
        _set_here.add("RAY_AUTH_TOKEN")
    return True


def _has_joined() -> bool:
    """Tell whether this process has joined a Ray. Does not import ray, but waits for a thread that does."""
    if "ray" not in sys.modules:
        return False
    import ray

    return bool(ray.is_initialized())


@contextmanager
def joined_ray(address: str | None = None) -> Iterator[None]:
    """Join Ray while the block runs.

    Args:
        address: A running cluster's address; by default RAY_ADDRESS, unless that is a dashboard's URL, else a Ray that
            is started here, and stopped after the block. A Ray that this process has already joined is used as it is.

    Raises:
        ClusterError: No cluster answers at the address within seconds, or it refuses the token; or no Ray starts here.
        UserError: The address is a dashboard's URL.
    """
    global _joined
    prepare_ray(address)
    import ray

    with _leaving:  # a Ray that another thread is about to leave
        pass
    if ray.is_initialized():
        with _ending_on_sigterm():
            yield
        return
    cluster = cluster_address(address)
    if cluster and _is_confined:
        raise UserError(f"this process has run a Ray for this machine alone; join {cluster} from a new process")
    options = {} if cluster else {"include_dashboard": False}
    with _without_dashboard(), _taking_the_token(cluster):
        try:
            context = ray.init(cluster or "local", **_what_ray_prints(), **options)
        except Exception as error:  # the type that Ray itself raises for a node that does not start (2.55 and 2.60)
            raise ClusterError(_why_not_joined(cluster, error)) from None
    _joined = joined = _Joined(None if cluster else Path(context.address_info["session_dir"]))
    delete_abandoned()
    if joined.session:
        note_ray_session(str(joined.session))
    try:
        with _ending_on_sigterm():
            yield
    finally:
        if _joined is joined:  # and none that was joined after it was left
            leave_ray()
        while _set_here:
            os.environ.pop(_set_here.pop(), None)


def has_own_ray() -> bool:
    """True if the Ray that this process has joined was started by :func:`joined_ray`, and nobody will start its parts
    again."""
    return _joined is not None and _joined.session is not None


@contextmanager
def leaving_ray() -> Iterator[None]:
    """Have whoever joins a Ray wait until the block, in which :func:`leave_ray` may be called, is done."""
    with _leaving:
        yield


def leave_ray() -> None:
    """Leave the Ray that :func:`joined_ray` has joined before its block ends; one that was joined before it stays."""
    global _joined
    import ray

    with _leaving:
        if _joined:
            ray.shutdown()
            if _joined.session:  # where another part has died they would go on for most of a minute
                kill_writers(_joined.session, *_AGENTS)
        _joined = None


def _what_ray_prints() -> dict[str, Any]:
    """Nothing of Ray and of the workers, unless raytorch is to tell all."""
    told = logging.getLogger("raytorch").isEnabledFor(logging.DEBUG)
    return {"log_to_driver": told, "logging_level": "INFO" if told else "ERROR"}


def _why_not_joined(cluster: str | None, error: Exception) -> str:
    if cluster:
        return f"the cluster at {cluster} cannot be joined: {error}"
    return (
        f"no Ray starts on this machine: {error}; on a machine with too much to do it may the next time, else look at "
        f"the logs in {tempfile.gettempdir()}/ray/session_latest/logs"
    )


@contextmanager
def _taking_the_token(cluster: str | None) -> Iterator[None]:
    """Let ``ray.init`` take the token from its usual places if the cluster asks for one, whatever its address.

    It does so by itself for ``auto`` alone, or where RAY_AUTH_MODE says so (Ray 2.55 and 2.60).
    """
    mode = token.mode_of(cluster) if cluster else None
    if mode is None:
        yield
        return
    config: Any = import_module("ray._raylet").Config
    before = os.environ.get(token.MODE)
    os.environ[token.MODE] = mode
    config.initialize("")  # which keeps what the environment said when ray was imported
    try:
        yield
    finally:
        if before is None:
            del os.environ[token.MODE]
        else:
            os.environ[token.MODE] = before


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """Let SIGTERM, by which a job is stopped, act like Ctrl-C: ``ray.init`` makes it an exit without a checkpoint."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _before_sigterm.append(signal.signal(signal.SIGTERM, signal.default_int_handler))
    try:
        yield
    finally:
        before = _before_sigterm.pop()
        if not _before_sigterm:  # the last to leave, who need not have been the first to come
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
