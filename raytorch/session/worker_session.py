"""A session's part on a worker: the registry and the interpreter in the actor's process, until the session ends."""

import pickle
import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import ray
import torch
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from raytorch.distributed import Worker, leaving_process_group
from raytorch.distributed.collectives import agree_through
from raytorch.distributed.process_group import RenewableGroup, connect_store
from raytorch.errors import SessionError
from raytorch.session.handles import HANDLES_PER_CLIENT
from raytorch.session.host import Group
from raytorch.session.interpreter import Interpreter
from raytorch.session.program import Report
from raytorch.session.rank_agreement import Peers
from raytorch.session.registry import Registry
from raytorch.session.result_structure import is_large
from raytorch.session.tensor_transfer import AdoptedMemory, Payload
from raytorch.system.allocator import keep_freed_memory
from raytorch.training.precision import choose_attention

LOOK_ROUND_S = 2.0
"""Seconds between two looks at who is still there."""


def describe_data(data: Sequence[Any]) -> tuple[bytes, list[Any]]:
    """The data of a rank for ``SessionWorker.run_relayed``; what relays it has no need to look into it."""
    references = [part for part in data if isinstance(part, ray.ObjectRef)]
    places = iter(range(len(references)))
    inline = [next(places) if isinstance(part, ray.ObjectRef) else part for part in data]
    return pickle.dumps(inline, protocol=5), references


def receive_data(described: bytes, references: Sequence[Any]) -> list[Any]:
    """What :func:`describe_data` described; an error in place of what is lost with the client that sent it."""
    inline = pickle.loads(described)  # noqa: S301 - from a client that Ray has let in
    return [_array(references[part]) if isinstance(part, int) else part for part in inline]


def _array(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        return SessionError(f"the data is lost with the client that sent it: {type(error).__name__}")


class HostedSession:
    """The session that this process hosts."""

    def __init__(self, group: Group, worker: Worker) -> None:
        self.group = group
        self.registry = Registry(group.max_bytes)
        peers = _peers(worker, group.timeout_s) if worker.world_size > 1 else None
        agree_through(peers)
        self.interpreter = Interpreter(self.registry, rank=worker.rank, device=worker.device, peers=peers)
        self.adopted = AdoptedMemory()
        self.ended = threading.Event()
        self.busy = False
        self.used_at = time.monotonic()
        self.ready = False

    def run(self, packed: bytes, data: Sequence[Any]) -> bytes | Report:
        """See :meth:`~raytorch.session.worker_actor.SessionWorker.run_program`."""
        if not self.ready:
            self._get_ready()
        self.busy = True
        try:
            attachments = [self._attached(*pair) for pair in zip(data[::2], data[1::2], strict=True)]
            report = self.interpreter.execute(packed, attachments)
            return report if report.answer and is_large(report.answer) else report.pack()
        finally:
            self.busy, self.used_at = False, time.monotonic()

    def _attached(self, payload: Payload | None, array: Any) -> Payload | Exception | None:
        if isinstance(array, Exception):
            return array
        return payload and self.adopted.admit(replace(payload, array=array))

    def _get_ready(self) -> None:
        """Prepare the thread that executes programs; some of PyTorch's settings are the thread's own."""
        device = self.interpreter.device
        torch.set_num_threads(self.group.threads)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        choose_attention(device)
        keep_freed_memory()
        self.ready = True

    def is_idle(self) -> bool:
        """True if nobody has asked for anything for longer than a session may be idle, and than a round of looks, in
        which another worker may have become busy."""
        limit = self.group.idle_timeout
        return limit is not None and not self.busy and time.monotonic() - self.used_at > limit + LOOK_ROUND_S

    def release(self, gone: Collection[int]) -> None:
        """Free what clients that are gone have made."""
        if gone:
            self.registry.free([handle for handle, _ in self.registry if handle // HANDLES_PER_CLIENT in gone])
        for client in gone:
            self.interpreter.forget(client)


def _peers(worker: Worker, timeout_s: float) -> Peers:
    store, group = PrefixStore("session", connect_store()), RenewableGroup(timeout_s)
    return Peers(store, rank=worker.rank, world_size=worker.world_size, group=group, timeout_s=timeout_s)


_hosted: HostedSession | None = None


def serve(config: dict[str, Any]) -> None:
    """Host a session in this process until a client ends it, or all ranks have been idle: the train function."""
    global _hosted
    host, worker = config["host"], Worker.current()
    _hosted = hosted = HostedSession(config["group"], worker)
    actor = ray.get_runtime_context().current_actor
    with leaving_process_group():
        ray.get(host.join.remote(worker.rank, actor))
        while not hosted.ended.wait(LOOK_ROUND_S):
            gone, is_over = ray.get(host.look.remote(worker.rank, hosted.is_idle()))
            if is_over:
                break
            hosted.release(set(gone))  # each round: its last program may still be running


def hosted_session() -> HostedSession:
    """The session that this process hosts, once :func:`serve` has begun."""
    assert _hosted, "the session has not begun"
    return _hosted
