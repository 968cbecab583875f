"""A session's group of workers: its process group, and what a client that is gone leaves behind."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from raytorch.distributed import Worker
from raytorch.session import host as hosting
from raytorch.session import open_or_join, worker_session
from raytorch.session.handles import HANDLES_PER_CLIENT
from raytorch.session.host import Group, SessionHost
from raytorch.session.worker_session import serve


@pytest.mark.parametrize(
    ("gpus", "backend", "resolved"),
    [
        (0, "auto", "gloo"),
        (0.5, "auto", "gloo"),
        (1, "auto", "nccl"),
        (2, "auto", "nccl"),
        (1, "gloo", "gloo"),
        (0.5, "nccl", "nccl"),
    ],
)
def test_auto_is_nccl_where_each_worker_has_a_gpu_of_its_own(gpus: float, backend: str, resolved: str) -> None:
    each = {"CPU": 1, **({"GPU": gpus} if gpus else {})}
    assert Group(2, each, backend, 60).resolved_backend == resolved


def test_how_long_a_call_may_take_is_the_sessions_own_setting_and_not_that_of_later_runs(tmp_path: Path) -> None:
    before = dict(os.environ)
    trainer = open_or_join._trainer(Group(2, {"CPU": 1}, "gloo", 60), None, str(tmp_path))
    assert dict(os.environ) == before
    assert float(trainer._environment["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"]) == 7 * 24 * 3600


def test_what_a_program_stores_after_its_client_has_gone_is_freed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = 0
    mine, theirs = 5, HANDLES_PER_CLIENT + 5

    def look(rank: int, is_idle: bool) -> tuple[list[int], bool]:
        nonlocal rounds
        rounds += 1
        hosted: Any = worker_session._hosted
        assert theirs not in hosted.registry
        hosted.registry.put(theirs, torch.ones(1))
        hosted.registry.put(mine, torch.ones(1))
        if rounds == 3:
            hosted.ended.set()
        return [1], False

    host = SimpleNamespace(look=SimpleNamespace(remote=look), join=SimpleNamespace(remote=lambda rank, actor: None))
    context = SimpleNamespace(current_actor=None)
    monkeypatch.setattr(
        worker_session, "ray", SimpleNamespace(get=lambda value: value, get_runtime_context=lambda: context)
    )
    monkeypatch.setattr(worker_session, "LOOK_ROUND_S", 0.0)
    monkeypatch.setattr(worker_session, "_hosted", None)
    monkeypatch.setattr(Worker, "current", lambda: Worker(0, 1, torch.device("cpu")))
    serve({"group": Group(1, {"CPU": 1}, "gloo", 1800), "host": host})
    assert rounds == 3
    assert [handle for handle, _ in worker_session._hosted.registry] == [mine]


def test_a_session_is_over_once_all_its_workers_have_been_idle_at_once() -> None:
    host = SessionHost(workers=2)
    looks = [(0, True), (1, False), (0, False), (1, True), (0, True)]
    assert [host.look(rank, is_idle)[1] for rank, is_idle in looks] == [False, False, False, False, True]
    assert host.look(1, False)[1], "the others have left"


def test_clients_join_an_open_session_under_numbers_of_their_own() -> None:
    host = SessionHost(workers=1)
    assert host.attach() is None
    assert host.skip_clients(3)  # who made handles that were restored
    host.open()
    assert [host.attach(), host.attach()] == [4, 5]
    assert not host.skip_clients(9)


def test_a_client_that_was_silent_for_too_long_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    host = SessionHost(workers=1)
    host.open()
    client = host.attach()
    assert client
    assert host.beat(client)
    assert host.end_for(client) is None
    monkeypatch.setattr(hosting, "SILENCE_S", -1.0)
    assert host.look(0, False) == ([client], False)
    assert not host.beat(client)
    assert "no sign of life" in str(host.end_for(client))
