"""The actor of a worker that hosts a session.

It imports no torch: every process that gets a handle of an actor loads its class, the session's host and the worker
group's controller among them.
"""

from typing import TYPE_CHECKING, Any

from raytorch.cluster.worker_group import WorkerActor

if TYPE_CHECKING:
    from raytorch.session.program import Report


class SessionWorker(WorkerActor):
    """The actor of a worker that hosts a session, which :func:`raytorch.session.worker_session.serve` begins.

    Its methods take bytes: a function, which Ray Train's own method takes, is pickled anew with each call.
    """

    def run_program(self, packed: bytes, *data: Any) -> "bytes | Report":
        """Execute a program; returns the report, as bytes if it is small, as Ray moves these faster than objects.

        ``data`` are its attachments: payloads, each without its array and followed by it, or None twice.
        """
        from raytorch.session.worker_session import hosted_session

        return hosted_session().run(packed, data)

    def run_relayed(self, packed: bytes, described: bytes, references: list[Any]) -> "bytes | Report":
        """Execute a program that came through the host; see ``worker_session.describe_data``."""
        from raytorch.session.worker_session import hosted_session, receive_data

        return hosted_session().run(packed, receive_data(described, references))

    def look(self) -> None:
        """Show that the worker is there, once it has done what it was asked for before."""

    def end_session(self) -> None:
        """Let :func:`raytorch.session.worker_session.serve` return."""
        from raytorch.session.worker_session import hosted_session

        hosted_session().ended.set()
