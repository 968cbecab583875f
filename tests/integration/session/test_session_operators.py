"""Handles of a real session give what PyTorch gives here: its own samples of every fourth of its operators.

All of them run in tests/unit/test_session_conformance.py, on a worker in that process.
"""

from collections.abc import Iterator

import pytest
import torch
from conformance.operators import run_operators
from conformance.skipped import SKIPPED

from raytorch.session.session import Session
from raytorch.training.precision import choose_attention


@pytest.fixture
def _attention_of_the_workers() -> Iterator[None]:
    """The same choice here as on the workers: the kernels of attention round differently."""
    before = torch.backends.cuda.flash_sdp_enabled()
    choose_attention(torch.device("cpu"))
    yield
    torch.backends.cuda.enable_flash_sdp(before)


@pytest.mark.usefixtures("_attention_of_the_workers")
def test_operators_give_on_workers_what_pytorch_gives_here(opened: Session) -> None:
    outcome = run_operators(opened, samples=1, gradients=False, every=4)
    different = outcome.different.keys() - SKIPPED.keys()
    assert not different, "\n".join(f"{name}: {outcome.different[name]}" for name in sorted(different))
    assert len(outcome.equal) >= 150
