"""Helpers for tests that compare what handles give with what PyTorch gives here."""

import gc
from collections.abc import Callable
from typing import Any

import torch
from in_process import registries
from torch import Tensor

from raytorch.session.remote_tensor import RemoteTensor
from raytorch.session.session import Session


def assert_same(remote: Any, local: Any) -> None:
    """A result by handles is PyTorch's: to the bit, with its dtype, shape and structure, on every rank."""
    if isinstance(local, Tensor):
        assert isinstance(remote, RemoteTensor)
        for fetched in remote.fetch(all=True):
            assert (fetched.dtype, fetched.requires_grad) == (local.dtype, local.requires_grad)
            torch.testing.assert_close(fetched.detach(), local.detach(), rtol=0, atol=0, equal_nan=True)
    elif isinstance(local, tuple | list):
        assert type(remote) is type(local)
        assert len(remote) == len(local)
        for left, right in zip(remote, local, strict=True):
            assert_same(left, right)
    else:
        assert type(remote) is type(local)
        assert remote == local


def check(session: Session, use: Callable[..., Any], *tensors: Tensor) -> None:
    """Using handles gives what using the tensors gives, and leaves them as it, at first and when the call is known."""
    for _ in range(3):
        local = [tensor.detach().clone() for tensor in tensors]
        remote = [session.tensor(tensor) for tensor in local]
        assert_same(use(*remote), use(*local))
        assert_same(remote, local)


def held_by(session: Session) -> list[Any]:
    """The workers' registries, once all that was recorded and collected has been dealt with."""
    gc.collect()
    session.synchronize()
    return registries(session)
