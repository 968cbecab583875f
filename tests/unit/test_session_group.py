"""A session's group of workers."""

import pytest

from raytorch.session.transport import Group


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
