"""What tests of hostile saved sessions share: good ones, forged ones, and how much memory is taken meanwhile."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from in_process import local_session
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raytorch.errors import RaytorchError
from raytorch.session import restore as restoring

LARGE = 32 * 2**20


class WatchedMemory(TorchDispatchMode):
    """Lets no tensor of many elements be made, and notes that it would have been."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Any] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        shape = args[0] if args and isinstance(args[0], list) else []
        on_meta = any(part.device.type == "meta" for part in tree_leaves((args, kwargs)) if isinstance(part, Tensor))
        is_large = all(isinstance(size, int) for size in shape) and torch.Size(shape).numel() > LARGE
        if is_large and not on_meta and str(kwargs.get("device")) != "meta":
            self.made.append(shape)
            raise MemoryError(f"{function} would make a tensor of {shape}")
        return function(*args, **kwargs)


@contextlib.contextmanager
def watched_memory() -> Iterator[WatchedMemory]:
    """Watches what the workers make while they restore."""
    memory, restore = WatchedMemory(), restoring.restore

    def watched(*args: Any, **options: Any) -> Any:
        with memory:
            return restore(*args, **options)

    with mock.patch.object(restoring, "restore", watched):
        yield memory


def good(folder: Path) -> dict[str, Any]:
    """Save a session; what its session.json says."""
    session = local_session()
    net = session.module(nn.Sequential, session.module(nn.Linear, 4, 3), session.module(nn.LSTM, 3, 2))
    optimizer = session.optimizer("adam", net.parameters(), lr=0.1)
    scheduler = session.scheduler(torch.optim.lr_scheduler.StepLR, optimizer, step_size=2)
    leaf = session.ones(3, requires_grad=True)
    session.save(folder)
    assert session.handles()[-1]["handle"] == leaf.handle > scheduler.handle
    return content_of(folder)


def content_of(folder: Path) -> dict[str, Any]:
    """What session.json says."""
    content: dict[str, Any] = json.loads((folder / "rank-0" / "session.json").read_text(encoding="utf-8"))
    return content


def refused(folder: Path, forged: Any, *, trust: bool = False) -> str:
    """The only error of restoring what session.json is made to say, with nothing large made and no handle left."""
    text = forged if isinstance(forged, str) else json.dumps(forged)
    (folder / "rank-0" / "session.json").write_text(text, encoding="utf-8")
    session = local_session()
    with watched_memory() as memory, pytest.raises(RaytorchError) as caught:
        session.restore(folder, trust=trust)
    assert not memory.made
    assert "SessionError" in str(caught.value)
    assert session.handles() == []
    return str(caught.value)


def making(name: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """An object of session.json's."""
    return {"make": name, "args": list(args), "kwargs": kwargs, "groups": [], "state": None, "modes": {}}
