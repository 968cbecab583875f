"""The way to a cluster: its dashboard's address, the token, and Ray's clients behind them. Imports ray when used."""

import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

from raytorch.cluster.capacity import AUTOSCALER_LABEL, Node
from raytorch.cluster.joining import is_dashboard
from raytorch.cluster.token import TOKEN_PLACES, find_token
from raytorch.errors import ClusterError, JobNotFoundError, Remedy
from raytorch.service.http import PROXY, Response, Server, readable
from raytorch.system.environment import environment

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
"""Ray's default, and where ``ray dashboard`` and ``kubectl port-forward`` lead by default."""
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
ANSWER_S = 5.0
"""Within which a dashboard has told its version."""
GREETING_BYTES = 64 * 1024
MOST_NODES = 10_000
AGENT_S, AGENT_PAUSE_S = 60.0, 1.0
"""How long the head of a cluster that has just started is waited for to take jobs, and between two requests."""
Answer = TypeVar("Answer")
_NO_AGENT = re.compile("No available agent to submit job|Failed to get head node agent")
"""Text of a dashboard, with status 500, that has looked for ten seconds for an agent to give jobs to: none was begun
(Ray 2.60)."""
_NO_ANSWER_OF_AGENT = re.compile(r"Cannot connect to host \S+|ServerDisconnectedError")
"""Text of a dashboard, with status 500, whose agent has died, or listens no more (Ray 2.60)."""
_LOOK = "look at dashboard.log on the head"
_LOSSES = ("Unexpected termination", "Terminated due to preemption")
"""How the state message of a node begins that has crashed, was cut off, or was taken back (Ray 2.60)."""
_TALKATIVE = (
    "dashboard.modules.job.sdk",
    "dashboard.modules.dashboard_sdk",
    "_private.runtime_env.packaging",
)
"""Loggers of Ray's clients, below ``ray``."""
_environment = threading.Lock()


def find_address(address: str | None) -> str:
    """The URL of the cluster's dashboard: ``address``, RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or Ray's default."""
    if address is None:
        there = (os.environ.get(name, "") for name in ADDRESS_VARIABLES)
        address = next((value for value in there if is_dashboard(value)), DEFAULT_ADDRESS)
    if not is_dashboard(address):
        raise ClusterError(f"{address}: give the URL of the cluster's dashboard, such as {DEFAULT_ADDRESS}")
    return address.rstrip("/")


@dataclass(frozen=True)
class Nodes:
    """The nodes of a cluster at one moment."""

    up: list[Node]
    has_lost: bool
    """True if one was lost, which may come back; see :mod:`raytorch.cluster.capacity`."""


class DashboardConnection:
    """Ray's clients of one cluster, with errors that say what to do."""

    def __init__(self, address: str | None = None) -> None:
        self.url = find_address(address)
        token = find_token()
        # Given with each request: whether Ray's clients look for a token themselves depends on RAY_AUTH_MODE.
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.server = self._greet()
        from ray.job_submission import JobSubmissionClient

        with self.explaining(), _without_addresses():
            self.jobs: Any = self._bounded(JobSubmissionClient)(self.url, headers=dict(self._headers))

    def nodes(self) -> Nodes:
        """The cluster's nodes, as its dashboard lists them now."""
        from ray.util.state import StateApiClient
        from ray.util.state.common import ListApiOptions, StateResource
        from ray.util.state.exception import RayStateApiException

        with self.explaining(), _without_addresses():
            client = self._bounded(StateApiClient)(self.url, headers=dict(self._headers))
            options = ListApiOptions(limit=MOST_NODES, detail=True)
            ask = partial(client.list, StateResource.NODES, options, raise_on_missing_output=False)
            try:  # Ray's NodeState of the nodes that are up and of those that were
                listed = list(self._once(ask, bool, "its dashboard knows of no node", _LOOK))
            except RayStateApiException as error:
                raise RuntimeError(error) from None
        up = [
            Node(node["node_id"], node["resources_total"], scales=AUTOSCALER_LABEL in (node["labels"] or {}))
            for node in listed
            if node["state"] == "ALIVE"
        ]
        lost = (node["state"] == "DEAD" and (node["state_message"] or "").startswith(_LOSSES) for node in listed)
        return Nodes(up, any(lost))

    def send(self, archive: Path) -> str:
        """Send a zip archive to the cluster; answers with the URI that it has there."""
        # Of itself Ray 2.55's client of jobs sends folders alone. Its method for a file is Ray 2.60's too.
        return str(self.jobs._upload_package_if_needed(str(archive), include_gitignore=False, is_file=True))

    @contextmanager
    def explaining(self, job: str | None = None) -> Iterator[None]:
        """Turn what Ray's clients raise in the block into errors that say what to do; what they log stays unsaid.

        Raises ClusterError if the cluster does not answer, or refuses, and JobNotFoundError if there is no ``job``.
        """
        try:
            with _quiet():
                yield
        except (OSError, HTTPException) as error:
            raise ClusterError(f"the cluster at {self.url} no longer answers: {_reason(error)}") from None
        except RuntimeError as error:
            if "status code 404" in str(error) and job is not None:
                raise JobNotFoundError(f"no job {job} on {self.url}", remedies=[Remedy("jobs")]) from None
            raise ClusterError(f"the cluster at {self.url} refuses: {_reason(error)}") from None
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise ClusterError(
                f"the cluster at {self.url} gives an answer that is not Ray's: {_reason(error)}"
            ) from None

    def _bounded(self, client: Any) -> Any:
        """Ray's ``client`` class (Ray 2.55 and 2.60) with requests through :attr:`server` alone, which bounds them."""

        def do_request(
            _: Any,
            method: str,
            endpoint: str,
            *,
            data: bytes | None = None,
            json_data: Any = None,
            params: Any = None,
            timeout: float | None = None,
        ) -> Response:
            path = quote(endpoint, safe="/%") + (f"?{urlencode(params, doseq=True)}" if params else "")
            kind = "application/octet-stream" if data else "application/json"
            content = json.dumps(json_data).encode() if json_data else data
            ask = partial(self.server.ask, path, method=method, content=content, kind=kind, within=timeout)
            answer = self._once(
                ask,
                lambda answer: answer.status_code != 500 or not _NO_AGENT.search(answer.text),
                "as far as its dashboard knows, no agent listens on its head, which the dashboard gives jobs to",
                "another program may have the agent's port there, 52365 unless 'ray start' was given another: end "
                "that, or start the head anew with --dashboard-agent-listen-port and a free one; dashboard_agent.log "
                "on the head says whether it is so",
            )
            if answer.status_code == 500 and (found := _NO_ANSWER_OF_AGENT.search(answer.text)):
                raise ClusterError(
                    f"the cluster at {self.url} takes no jobs: the agent on its head, which the dashboard gives jobs "
                    f"to, no longer answers ({readable(found[0])}); start Ray anew there, and look at "
                    "dashboard_agent.log for why the agent has ended"
                )
            if answer.status_code in (401, 403):
                raise self._refused(answer.status_code)
            return answer

        return type(client.__name__, (client,), {"_do_request": do_request})

    def _once(self, ask: Callable[[], Answer], is_ready: Callable[[Answer], bool], lack: str, remedy: str) -> Answer:
        """An answer, asked for again while it shows that the cluster takes no jobs yet."""
        deadline = time.monotonic() + AGENT_S
        while not is_ready(answer := ask()):
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"the cluster at {self.url} takes no jobs: {lack}; if the cluster has just started, try again, "
                    f"else {remedy}"
                )
            time.sleep(AGENT_PAUSE_S)
        return answer

    def _greet(self) -> Server:
        """Ask for the version: Ray's client would import ray before it finds that nothing answers."""
        try:
            server = Server(self.url, self._headers)
            answer = server.ask("/api/version", within=ANSWER_S, most=GREETING_BYTES)
        except (OSError, HTTPException) as error:
            past_proxy = (
                " http_proxy is not used for clusters, whose token it could read: if one is to be used all the same, "
                f"name it in {PROXY}"
            )
            raise ClusterError(
                f"no Ray cluster answers at {self.url} ({_reason(error)}); is the address right, and the port "
                "forwarded ('ray dashboard cluster.yaml', 'kubectl port-forward')?"
                + (past_proxy if server.passes_proxy() else "")
            ) from None
        except ValueError as error:  # in the name of the host, or of a proxy
            raise ClusterError(
                f"{self.url} cannot be asked: {_reason(error)}; give the URL of the cluster's dashboard, such as "
                f"{DEFAULT_ADDRESS}, and in {PROXY}, if it is set, that of a proxy"
            ) from None
        if answer.status_code != 200:
            raise self._refused(answer.status_code)
        try:
            answer.json()["ray_version"]
        except (ValueError, KeyError, TypeError):
            raise ClusterError(
                f"what answers at {self.url} is no Ray dashboard; give its URL as the address",
                remedies=[Remedy("address")],
            ) from None
        return server

    def _refused(self, status: int) -> ClusterError:
        if status in (401, 403):
            what = "refuses the token" if self._headers else "asks for a token, and there is none here"
            return ClusterError(
                f"the cluster at {self.url} {what} (HTTP {status}); give the cluster's token in one of {TOKEN_PLACES}, "
                "which are looked into in this order"
            )
        return ClusterError(f"what answers at {self.url} is no Ray dashboard (HTTP {status}); give its URL")


def _reason(error: Exception) -> str:
    """Return what an error says, which may be in the server's words; at least its kind."""
    return readable(str(getattr(error, "reason", None) or error) or type(error).__name__)


@contextmanager
def _without_addresses() -> Iterator[None]:
    """Hide the variables that would win over the address that Ray's clients are given."""
    with _environment, environment(dict.fromkeys(ADDRESS_VARIABLES)):
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ray's clients, where this thread uses them, from telling each package and each address that they try."""
    here = threading.get_ident()

    def is_kept(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or record.thread != here

    loggers = [logging.getLogger(f"ray.{name}") for name in _TALKATIVE]
    for logger in loggers:
        logger.addFilter(is_kept)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_kept)
