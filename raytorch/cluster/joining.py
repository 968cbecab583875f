"""Joining Ray: a cluster that runs, or one that is started here for as long as it is needed. Imports no torch."""

import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from secrets import token_hex
from typing import Any

from raytorch.cluster import token
from raytorch.errors import ClusterError, UserError
from raytorch.system.environment import environment
from raytorch.system.processes import interrupting_handlers, kill_writers, set_handlers
from raytorch.system.temporary_folders import delete_abandoned, note_ray_session

_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
_CONFINING = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""0 makes 127.0.0.1 the node's address, as on macOS; each process reads it as it imports ray (Ray 2.55 and 2.60)."""

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

_LONGEST_TMPDIR = 35
"""Characters that leave room for the names of Ray's sockets (Ray 2.60), also where the system takes 103 in all."""
_OWN_TOKEN = token_hex(32)
"""Of every Ray that this process starts where the user's home cannot take one."""
_set_here: set[str] = set()
"""Settings that are to go again, as other processes that this one starts may join a cluster."""
_AGENTS = ("ray::DashboardA", "ray::RuntimeEnv")
"""How the names of the processes begin that a raylet starts to help it (Ray 2.60)."""


@dataclass(frozen=True, eq=False)
class _Joined:
    """The Ray that a :func:`joined_ray` has joined."""

    session: Path | None
    """The folder of its logs, if it was started here."""


_joined: _Joined | None = None
leaving_ray = threading.RLock()
"""Held while a Ray is left: whoever joins one waits for that."""
_handlers_before: list[dict[int, Any]] = []
"""The handlers of signals that were there before each :func:`joined_ray` that goes on."""


def cluster_address(address: str | None) -> str | None:
    """The address of the cluster to join: ``address``, else RAY_ADDRESS; None if a Ray is to be started here.

    A URL in RAY_ADDRESS is that of a dashboard, where jobs are sent, and no cluster to join.

    Raises:
        UserError: ``address`` is such a URL.
    """
    if address and is_dashboard(address):
        raise UserError(
            f"{address} is the URL of a dashboard, where jobs are submitted; to join a cluster from here, give "
            "HOST:6379 or auto"
        )
    there = os.environ.get("RAY_ADDRESS", "")
    return address or ("" if is_dashboard(there) else there) or None


def is_dashboard(address: str) -> bool:
    """True for the URL of a dashboard."""
    return address.startswith(("http://", "https://"))


def starts_ray(address: str | None) -> bool:
    """Tell whether :func:`joined_ray` will start a Ray here; raises as :func:`cluster_address` does."""
    return not (cluster_address(address) or _has_joined())


def prepare_ray(address: str | None) -> None:
    """Choose Ray's settings for one machine, if :func:`joined_ray` will start a Ray here, and until that is left.

    Best before the first import of ray. What the environment says already stays. Raises as :func:`cluster_address`.
    """
    if not starts_ray(address):
        if not _has_joined():
            _take_settings_back()  # of a Ray that was prepared for, and not started
        return
    for name in _EMBEDDED_SETTINGS.keys() - os.environ.keys():
        os.environ[name] = _EMBEDDED_SETTINGS[name]
        _set_here.add(name)
    if token.needs_token_here():
        os.environ["RAY_AUTH_TOKEN"] = _OWN_TOKEN
        _set_here.add("RAY_AUTH_TOKEN")


def _take_settings_back() -> None:
    while _set_here:
        os.environ.pop(_set_here.pop(), None)
    if "ray" in sys.modules:
        _settle_reach()


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

    Example:
        >>> with joined_ray("10.0.0.1:6379"):  # several runs on the Ray that is joined once
        ...     results = [raytorch.train(config) for config in configs]
    """
    global _joined
    prepare_ray(address)
    import ray

    with leaving_ray:  # a Ray that another thread is about to leave
        pass
    with _ending_when_told() as end_when_told:
        if ray.is_initialized():
            end_when_told()
            yield
            return
        joined = None
        try:
            _joined = joined = _join(cluster_address(address))
            end_when_told()
            delete_abandoned()
            if joined.session:
                note_ray_session(str(joined.session))
            yield
        finally:
            if _joined is joined:  # and none that was joined after it was left
                leave_ray()
            _take_settings_back()


def _join(cluster: str | None) -> _Joined:
    import ray
    from ray.job_config import JobConfig

    told = logging.getLogger("raytorch").isEnabledFor(logging.DEBUG)  # else nothing of Ray and of the workers
    options: dict[str, Any] = {"log_to_driver": told, "logging_level": "INFO" if told else "ERROR"}
    if not cluster:
        options["include_dashboard"] = False
    # Without it the workers import from the current folder first, also a torch.py that is there by chance (Ray 2.60).
    options["job_config"] = JobConfig(_client_job=not _imports_from_here())
    _settle_reach()
    # A RAY_ADDRESS that is a dashboard's is hidden from ray.init, which would join it, and from what that starts.
    hidden = {"RAY_ADDRESS": None} if is_dashboard(os.environ.get("RAY_ADDRESS", "")) else {}
    with environment(hidden), _taking_the_token(cluster), _hang_ups_held():
        try:
            context = ray.init(cluster or "local", **options)
        except Exception as error:  # the type that Ray itself raises for a node that does not start (2.55 and 2.60)
            if cluster:
                raise ClusterError(f"the cluster at {cluster} cannot be joined: {error}") from None
            raise ClusterError(f"no Ray starts on this machine: {error}; {_remedy(error)}") from None
    return _Joined(None if cluster else Path(context.address_info["session_dir"]))


def _imports_from_here() -> bool:
    try:
        here = Path.cwd()
    except FileNotFoundError:
        raise UserError("the current folder has been deleted; go to one that is there, by cd, and try again") from None
    return any(Path(entry).absolute() == here for entry in sys.path)


def _remedy(error: Exception) -> str:
    folder = tempfile.gettempdir()
    if "AF_UNIX path" in str(error):
        return f"set TMPDIR to a folder of at most {_LONGEST_TMPDIR} characters: {folder} has {len(folder)}"
    logs = f"{folder}/ray/session_latest/logs"
    return f"on a machine with too much to do it may the next time, else look at the logs in {logs}"


@contextmanager
def _hang_ups_held() -> Iterator[None]:
    """Keep SIGHUP for after the block, and from the processes that start in it: Ray's have the same terminal, and have
    to be there for a last checkpoint. Ray itself does so with SIGINT."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def has_own_ray() -> bool:
    """True if the Ray that this process has joined was started by :func:`joined_ray`, and nobody will start its parts
    again."""
    return _joined is not None and _joined.session is not None


def leave_ray() -> None:
    """Leave the Ray that :func:`joined_ray` has joined before its block ends; one that was joined before it stays."""
    global _joined
    import ray

    with leaving_ray:
        if _joined:
            ray.shutdown()
            if _joined.session:  # where another part has died they would go on for most of a minute
                kill_writers(_joined.session, *_AGENTS)
        _joined = None


def _settle_reach() -> None:
    """Have Ray read anew if it is to keep to this machine, which it does by itself as it is imported."""
    constants: Any = import_module("ray._private.ray_constants")
    constants.ENABLE_RAY_CLUSTER = constants.env_bool(_CONFINING, not constants.IS_WINDOWS_OR_OSX)


@contextmanager
def _taking_the_token(cluster: str | None) -> Iterator[None]:
    """Let ``ray.init`` take the token from its usual places if the cluster asks for one, whatever its address.

    It does so by itself for ``auto`` alone, or where RAY_AUTH_MODE says so, and keeps the first token that it has read
    (Ray 2.55 and 2.60).
    """
    raylet: Any = import_module("ray._raylet")
    mode = token.mode_of(cluster) if cluster else os.environ.get(token.MODE)
    if cluster and mode is None:
        yield
        return
    with environment({token.MODE: mode}):
        raylet.Config.initialize("")  # which keeps what the environment said when ray was imported
        raylet.AuthenticationTokenLoader.instance().reset_cache()
        yield


@contextmanager
def _ending_when_told() -> Iterator[Callable[[], Any]]:
    """Let the signals that end a process act like Ctrl-C from when what is yielded is called: after ``ray.init``,
    which makes SIGTERM an exit without a checkpoint. What was there before comes back."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    handlers = interrupting_handlers()
    _handlers_before.append({number: signal.getsignal(number) for number in handlers})
    try:
        yield partial(set_handlers, handlers)
    finally:
        before = _handlers_before.pop()
        if not _handlers_before:  # the last to leave, who need not have been the first to come
            set_handlers(before)
