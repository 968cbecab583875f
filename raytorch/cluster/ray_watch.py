"""Watches the parts of Ray that all else here depends on: its head process, the GCS, and the raylet of this machine."""

import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Self

import ray

from raytorch.cluster.joining import has_own_ray

lost = threading.Event()
"""Set when a part of the Ray that this process has joined was lost: Ray's threads here wait for it, then end all."""

LOOK_S = 2.0
"""Seconds between two looks at them."""
ANSWER_POLL_S = 1.0
"""Seconds after which who waits for an answer asks whether Ray is still there."""


class HeadLostError(ray.exceptions.RayError):
    """Ray's head process, the GCS, no longer answers."""


class RayletLostError(ray.exceptions.RayError):
    """The raylet of the driver's machine is gone, and with it all of Ray there."""

    def __init__(self) -> None:
        super().__init__("the raylet of the driver's machine died, killed or crashed, and with it all of Ray there")


class RayWatch:
    """Asks in a thread of its own whether Ray's head process and the raylet here are there.

    Without the one Ray ends this process after a minute, without the other after a quarter of one (Ray 2.60), before it
    can say why.

    Args:
        tell: Called in that thread, once, with the error when one of them is lost.

    Attributes:
        patience: Seconds without a cluster's head process after which it is lost: half of those that Ray has, as it may
            be started again. A raylet is not, nor the head process of a Ray that was started here.
    """

    def __init__(self, tell: Callable[[ray.exceptions.RayError], None] = lambda error: None) -> None:
        self.patience = float(os.environ.get("RAY_gcs_rpc_server_reconnect_timeout_s", 60)) / 2  # noqa: SIM112
        host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
        self._head = (host.strip("[]"), int(port))
        self._raylet = _raylet_address()
        self._has_own_head = has_own_ray()
        self._seen = time.monotonic()
        self._lost: ray.exceptions.RayError | None = None
        self._tell = tell
        self._ended = threading.Event()

    def require(self) -> None:
        """Raise HeadLostError or RayletLostError if one of them is lost."""
        if self._lost is None and (silence := time.monotonic() - self._seen) > self.patience:
            self._lost = HeadLostError(f"Ray's head process (gcs_server) has not answered for {silence:.0f} s")
        if self._lost:
            lost.set()
            raise self._lost

    def wait_for(self, reference: Any, meanwhile: Callable[[], None] = lambda: None) -> Any:
        """Return what a call to an actor answers, or several; ``meanwhile`` is called every second.

        Raises:
            RayError: The actor, or a part of Ray, is lost; HeadLostError and RayletLostError also after Ray was left,
                when a call would start another.
        """
        while True:
            self.require()
            try:
                return ray.get(reference, timeout=ANSWER_POLL_S)
            except ray.exceptions.GetTimeoutError:
                meanwhile()

    def look(self) -> None:
        """Ask both of them now. Raises as :meth:`require` does."""
        head = _listens(self._head)
        if head:
            self._seen = time.monotonic()
        elif head is False and self._has_own_head:
            self._lost = self._lost or HeadLostError("Ray's head process (gcs_server) died, killed or crashed")
        if _listens(self._raylet) is False:
            self._lost = self._lost or RayletLostError()
        self.require()

    def __enter__(self) -> Self:
        threading.Thread(target=self._look_again_and_again, name="raytorch-watch", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def _look_again_and_again(self) -> None:
        while not self._ended.wait(LOOK_S):
            try:
                self.look()
            except ray.exceptions.RayError as error:
                self._tell(error)
                return


def is_raylet_lost() -> bool:
    """Tell whether the raylet of this machine is gone, which Ray takes a quarter of a minute to notice."""
    return _listens(_raylet_address()) is False


def _raylet_address() -> tuple[str, int]:
    here = ray.get_runtime_context().get_node_id()
    node: dict[str, Any] = next(node for node in ray.nodes() if node["NodeID"] == here)
    return node["NodeManagerAddress"], node["NodeManagerPort"]


def _listens(address: tuple[str, int]) -> bool | None:
    """Tell whether somebody listens there; None if that is not said in time. On the same machine the system says at
    once that nobody does."""
    try:
        socket.create_connection(address, timeout=LOOK_S).close()
    except ConnectionRefusedError:
        return False
    except OSError:
        return None
    return True
