"""Opening a session on a group of workers, and joining one by its name. Imports neither torch nor ray at first."""

import contextlib
import math
from collections.abc import Callable
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raytorch.cluster.capacity import require_resources
from raytorch.cluster.joining import joined_ray
from raytorch.errors import SessionError, UserError

if TYPE_CHECKING:
    from raytorch.session.session import Session


def connect(
    *,
    workers: int | None = None,
    name: str | None = None,
    address: str | None = None,
    cpus_per_worker: float = 1,
    gpus_per_worker: float = 0,
    backend: Literal["auto", "nccl", "gloo"] = "auto",
    max_bytes: int | None = None,
    idle_timeout: float | None = None,
    timeout_s: int = 1800,
    restore: str | Path | None = None,
    trust: bool = False,
) -> "Session":
    """Open a session on a group of workers, or join one that is open.

    Args:
        workers: Number of workers; by default 1, or as many as saved what is restored. Left out with a ``name``, the
            session of that name is joined.
        name: A name under which other processes on the cluster can join the session.
        address: A running Ray cluster's address; by default RAY_ADDRESS, unless it is the http URL of a dashboard, else
            a Ray that is started here.
        cpus_per_worker: CPUs of each worker, which are also its threads.
        gpus_per_worker: GPUs of each worker.
        backend: Of the process group; ``auto`` is NCCL where each worker holds a GPU of its own, else gloo.
        max_bytes: Bytes of tensors that handles may hold on each worker, gradients and optimizer state included; None
            for no limit.
        idle_timeout: Seconds without any call after which the session ends by itself; None for never.
        timeout_s: Seconds after which a collective operation that makes no progress fails.
        restore: A folder that ``save`` of a session with as many workers has written: all that it holds is there again,
            under the same handles, for ``get``. Not for a session that is joined.
        trust: Whether that folder may bring classes and functions of its own, which can run any code.

    Raises:
        RemoteOpError: The saved session could not be restored.
        ResourceError: The machine or cluster can never give the CPUs or GPUs that the workers ask for.
        SessionError: No session of that name is open, or one is open already; or one is to be joined and restored.
        SessionLostError: The workers could not be started.
        UserError: No cluster answers at the address, or an argument is none that is allowed.

    Example:
        >>> with connect(workers=2) as session:
        ...     x = session.randn(3, 3)
        ...     print((x @ x.T).trace().item())
    """
    _require_possible(locals())
    if workers is None and name is not None and restore is not None:
        raise SessionError(
            f"restore= would replace what the session {name!r} has: leave it out to join, or give workers= to open one"
        )
    resources = contextlib.ExitStack()
    try:
        resources.enter_context(joined_ray(address))
        from raytorch.session.host import Group
        from raytorch.session.open_or_join import Guest, Owner
        from raytorch.session.session import Session  # not before Ray's settings are chosen

        if workers is None and name is not None:
            connection: Guest | Owner = Guest(name, resources)
        else:
            each = {"CPU": cpus_per_worker, **({"GPU": gpus_per_worker} if gpus_per_worker else {})}
            workers = workers or (len(list(Path(restore).glob("rank-*"))) if restore else 0) or 1
            require_resources(workers, each, prefix="")
            group = Group(workers, each, backend, timeout_s, max_bytes, idle_timeout)
            connection = Owner(name, group, resources)
        session = Session(connection, client=connection.client)
    except BaseException:
        resources.close()
        raise
    try:
        if restore is not None:
            session.restore(restore, trust=trust)
        connection.open()
    except BaseException:
        session.close()
        raise
    return session


def _require_possible(arguments: dict[str, Any]) -> None:
    for name, (is_possible, expected) in _POSSIBLE.items():
        if not is_possible(arguments[name]):
            raise UserError(f"{name}={arguments[name]!r:.80} is not possible; expected {expected}")


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def _is_whole(value: Any, least: int) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral) and int(value) >= least


_BACKENDS = ("auto", "nccl", "gloo")
_LONGEST_S = 10**9
_POSSIBLE: dict[str, tuple[Callable[[Any], bool], str]] = {
    "workers": (lambda value: value is None or _is_whole(value, 1), "a whole number of at least 1"),
    "cpus_per_worker": (lambda value: _is_number(value) and value > 0, "more than 0"),
    "gpus_per_worker": (lambda value: _is_number(value) and value >= 0, "0 or more"),
    "backend": (lambda value: value in _BACKENDS, f"one of {', '.join(_BACKENDS)}"),
    "max_bytes": (lambda value: value is None or _is_whole(value, 0), "None or a whole number from 0"),
    "idle_timeout": (
        lambda value: value is None or (_is_number(value) and value >= 0),
        "None or seconds, 0 or more",
    ),
    "timeout_s": (lambda value: _is_number(value) and 0 < value <= _LONGEST_S, "seconds, more than 0"),
}
"""For each argument what it may be, and that in words."""
