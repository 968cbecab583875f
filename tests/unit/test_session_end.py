"""What is left of a session that was closed: an error that says so."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from in_process import local_session
from torch import nn

from raytorch.errors import SessionLostError


def test_after_it_was_closed_everything_raises_that_the_session_is_lost() -> None:
    session = local_session(2)
    tensor, module = session.ones(2), session.module(nn.Linear, 2, 2)
    optimizer = session.optimizer("sgd", module.parameters(), lr=0.1)
    (tensor + 1).sum().item()
    session.close()
    session.close()  # once more does no harm
    uses: list[Callable[[], Any]] = [
        tensor.fetch,
        tensor.item,
        lambda: tensor.shape,
        lambda: tensor + 1,
        lambda: tensor.add_(1),
        lambda: tensor.cos(),
        lambda: session.tensor([1.0]),
        lambda: session.scatter(torch.ones(2)),
        lambda: session.zeros(2),
        lambda: session.rank(0).zeros(2),
        lambda: session.manual_seed(0),
        lambda: session.run(len, [1]),
        lambda: session.get(1),
        lambda: module(tensor),
        module.state_dict,
        optimizer.step,
        session.stats,
        session.handles,
        session.barrier,
        session.synchronize,
    ]
    for use in uses:
        with pytest.raises(SessionLostError, match="connect again"):
            use()
